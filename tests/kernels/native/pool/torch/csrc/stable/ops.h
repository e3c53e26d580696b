// Stands in for what the thread pool takes of torch: a parallel loop, on threads that ThreadSanitizer knows, and
// errors. As torch's, the loop gives each thread one share, the caller the first one, and a thread ends it late now and
// then.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <vector>

#define STD_TORCH_CHECK(holds, ...) \
  if (!(holds)) throw std::runtime_error(stand_in::text_of(__VA_ARGS__))

namespace stand_in {

template <class... T>
std::string text_of(const T&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// The threads of one caller, as OpenMP has them.
class Team {
 public:
  ~Team() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ends_ = true;
    }
    begun_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(int threads, const std::function<void(int64_t, int64_t)>& f) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (int(threads_.size()) < threads - 1) threads_.emplace_back(&Team::help, this, int(threads_.size()) + 1);
    work_ = &f;
    wanted_ = threads;
    left_ = threads - 1;
    ++loop_;
    lock.unlock();
    begun_.notify_all();
    f(0, 1);
    lock.lock();
    done_.wait(lock, [&] { return left_ == 0; });
  }

 private:
  void help(int number) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      begun_.wait(lock, [&] { return ends_ || (loop_ != seen && number < wanted_); });
      if (ends_) return;
      seen = loop_;
      const bool late = number == 1 && loop_ % 64 == 0;
      lock.unlock();
      (*work_)(number, number + 1);
      if (late) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      lock.lock();
      if (--left_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable begun_, done_;
  std::vector<std::thread> threads_;
  const std::function<void(int64_t, int64_t)>* work_ = nullptr;
  uint64_t loop_ = 0;
  int wanted_ = 0, left_ = 0;
  bool ends_ = false;
};

}  // namespace stand_in

namespace torch::stable {

inline void parallel_for(int64_t first, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& f) {
  static thread_local stand_in::Team team;
  if (first != 0) throw std::logic_error("the pool's loops begin at 0");
  team.run(int(end), f);
}

}  // namespace torch::stable
