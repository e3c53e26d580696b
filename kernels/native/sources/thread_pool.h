// Runs phases, split into parts that threads take in turn, with a barrier between phases. The caller works too, and
// waits for parts, not for helpers without a core. Helpers are torch's threads in one parallel loop: others would
// compete with them while they spin. If such a loop ends late, since another process has a core, own threads help for a
// while, which sleep without work. Not handled: two callers (the second runs alone), nested calls, pinning to cores.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "phases.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace river {

constexpr int kSpins = 1000;  // pauses

inline void wait(int spins) {
  if (spins >= kSpins) return std::this_thread::yield();
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

class ThreadPool {
  using Clock = std::chrono::steady_clock;

 public:
  static ThreadPool& instance() {
    static ThreadPool* const pool = make();  // never destroyed: its threads may outlive static objects
    return *pool;
  }

  void run(const Phase* phases, int count, int threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    const bool split = std::any_of(phases, phases + count, [](const Phase& phase) { return phase.parts > 1; });
    if (threads <= 1 || !split || !turn.owns_lock()) {
      for (int i = 0; i < count; ++i)
        for (int part = 0; part < phases[i].parts; ++part) phases[i].run(phases[i].args, part, phases[i].parts);
      return;
    }
    if (forked_ || Clock::now() < apart_until_) {
      ensure(threads - 1);
      for (int i = 0; i < count; ++i) publish(phases[i]);
      return;
    }
    helpers_.store(0, std::memory_order_relaxed);
    const Clock::time_point ended = run_among_torchs(phases, count, threads);
    const Clock::time_point now = Clock::now();
    if (now - ended > kLate) apart_until_ = now + kApart;
  }

 private:
  // A cursor is the number of a phase, its parts, and the next part that nobody took: 32, 16 and 16 bits.
  static uint64_t cursor_of(uint64_t epoch, uint64_t parts) { return epoch << 32 | parts << 16; }
  static int parts_of(uint64_t cursor) { return int(cursor >> 16 & 0xffff); }
  static int next_of(uint64_t cursor) { return int(cursor & 0xffff); }
  static bool has_work(uint64_t cursor) { return next_of(cursor) < parts_of(cursor); }

  static ThreadPool* make() {
    // After a fork neither these threads nor torch's exist in the child: it starts with an empty pool.
    pthread_atfork(nullptr, nullptr, [] { (new (&instance()) ThreadPool)->forked_ = true; });
    return new ThreadPool;
  }

  Clock::time_point run_among_torchs(const Phase* phases, int count, int threads) {
    Clock::time_point ended;
    finished_.store(false);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t end) {
      for (int64_t thread = first; thread < end; ++thread) {
        if (thread > 0) {
          follow();
          continue;
        }
        for (int i = 0; i < count; ++i) publish(phases[i]);
        ended = Clock::now();
        finished_.store(true);
      }
    });
    return ended;
  }

  // Takes parts until the last phase has ended.
  void follow() {
    for (int spins = 0; !finished_.load(std::memory_order_acquire); ++spins) {
      if (has_work(cursor_.load(std::memory_order_acquire))) {
        work();
        spins = 0;
      } else {
        wait(spins);
      }
    }
  }

  void publish(const Phase& phase) {
    if (phase.parts == 1) return phase.run(phase.args, 0, 1);
    phase_ = phase;
    done_.store(0, std::memory_order_relaxed);
    cursor_.store(cursor_of(++epoch_, uint64_t(phase.parts)));
    if (helpers_.load(std::memory_order_relaxed) && sleeping_.load()) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    work();
    for (int spins = 0; done_.load(std::memory_order_acquire) < phase.parts; ++spins) wait(spins);
  }

  // Takes parts of the present phase until none is left. A part that was taken keeps the phase from ending.
  void work() {
    uint64_t cursor = cursor_.load(std::memory_order_acquire);
    while (has_work(cursor)) {
      if (!cursor_.compare_exchange_weak(cursor, cursor + 1, std::memory_order_acq_rel)) continue;
      const int parts = parts_of(cursor);
      phase_.run(phase_.args, next_of(cursor), parts);
      done_.fetch_add(1, std::memory_order_acq_rel);
      cursor = cursor_.load(std::memory_order_acquire);
    }
  }

  void help(int number) {
    int spins = 0;
    for (;;) {
      if (number < helpers_.load(std::memory_order_relaxed) && has_work(cursor_.load(std::memory_order_acquire))) {
        work();
        spins = 0;
      } else if (++spins < kSpins) {
        wait(spins);
      } else {
        sleep(number);
        spins = 0;
      }
    }
  }

  void sleep(int number) {
    std::unique_lock<std::mutex> lock(sleep_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [&] { return number < helpers_.load() && has_work(cursor_.load()); });
    sleeping_.fetch_sub(1);
  }

  void ensure(int helpers) {
    helpers_.store(helpers, std::memory_order_relaxed);
    for (; started_ < helpers; ++started_) std::thread(&ThreadPool::help, this, started_).detach();
  }

  static constexpr auto kLate = std::chrono::microseconds(300), kApart = std::chrono::milliseconds(500);

  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> cursor_{0};
  std::atomic<int> done_{0}, sleeping_{0}, helpers_{0};
  std::atomic<bool> finished_{false};
  Clock::time_point apart_until_{};
  bool forked_ = false;
  uint64_t epoch_ = 0;
  int started_ = 0;
  Phase phase_{};
};

}  // namespace river
