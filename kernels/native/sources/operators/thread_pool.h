// Runs phases, split into parts, with a barrier between phases. Each thread takes the parts of its range in order, to
// read on where it stopped, then those that others have not begun. The caller works too, and waits for parts, not for
// helpers without a core. Helpers are torch's threads in one parallel loop: others would compete with them while they
// spin. If such a loop ends late, since another process has a core, own threads help for a while, which sleep without
// work. Not handled: two callers (the second runs alone), nested calls, pinning to cores.
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
  __asm__ __volatile__("isb");  // (some 20 cycles, where `yield` is none)
#endif
}

class ThreadPool {
  using Clock = std::chrono::steady_clock;

 public:
  static ThreadPool& instance() {
    static ThreadPool* const pool = make();  // never destroyed: its threads may outlive static objects
    return *pool;
  }

  static constexpr int kMostParts = (1 << 16) - 1;  // of a phase

  // Raises an error for a phase of more than kMostParts parts, before the first phase runs.
  void run(const Phase* phases, int count, int threads) {
    int most = 0;
    for (int i = 0; i < count; ++i) most = std::max(most, phases[i].parts);
    STD_TORCH_CHECK(most <= kMostParts, "a phase of ", most, " parts has more than ", kMostParts);
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (threads <= 1 || most <= 1 || !turn.owns_lock()) {
      for (int i = 0; i < count; ++i)
        for (int part = 0; part < phases[i].parts; ++part) phases[i].run(phases[i].args, part, phases[i].parts);
      return;
    }
    divide(std::min(threads, kMostRanges));
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
  // The present phase: its number, parts and ranges. A range's cursor: the phase that it is of, and the next part that
  // no thread took; that of an earlier phase stands for the range's first part.
  static constexpr int kLow = 24, kRangeBits = 8, kMostRanges = 64;
  static_assert(kMostParts < 1 << (kLow - kRangeBits));
  static uint64_t joined(uint64_t epoch, uint64_t low) { return epoch << kLow | low; }
  static uint64_t epoch_of(uint64_t joined) { return joined >> kLow; }
  static uint64_t low_of(uint64_t joined) { return joined & ((1 << kLow) - 1); }

  // Cursors are set back before the numbers of phases, of 40 bits, can come round.
  void divide(int ranges) {
    if (ranges == ranges_ && epoch_ < renewed_ + (uint64_t(1) << 36)) return;
    ranges_ = ranges;
    renewed_ = epoch_;
    for (Range& range : ranges_of_) range.cursor.store(joined(epoch_, (1 << kLow) - 1));
  }

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
          follow(int(thread));
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
  void follow(int thread) {
    uint64_t seen = 0;
    for (int spins = 0; !finished_.load(std::memory_order_acquire); ++spins) {
      const uint64_t present = present_.load(std::memory_order_acquire);
      if (present == seen) {
        wait(spins);
        continue;
      }
      work(thread, seen = present);
      spins = 0;
    }
  }

  void publish(const Phase& phase) {
    if (phase.parts == 1) return phase.run(phase.args, 0, 1);
    phase_ = phase;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t present = joined(++epoch_, phase.parts << kRangeBits | ranges_);
    present_.store(present);
    if (helpers_.load(std::memory_order_relaxed) && sleeping_.load()) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    work(0, present);
    for (int spins = 0; done_.load(std::memory_order_acquire) < phase.parts; ++spins) wait(spins);
  }

  // Takes parts of the present phase until none is left, those of the thread's own range first. A part that was taken
  // keeps the phase from ending.
  void work(int thread, uint64_t present) {
    const int ranges = int(low_of(present) & ((1 << kRangeBits) - 1)), parts = int(low_of(present) >> kRangeBits);
    for (int i = 0; i < ranges; ++i) {
      const int range = (thread + i) % ranges;
      for (int part; (part = take(range, epoch_of(present), share_of(parts, range, ranges))) >= 0;) {
        phase_.run(phase_.args, part, parts);
        done_.fetch_add(1, std::memory_order_acq_rel);
      }
    }
  }

  // Returns the next part of a range, -1 if all are taken.
  int take(int range, uint64_t epoch, Share share) {
    std::atomic<uint64_t>& cursor = ranges_of_[range].cursor;
    uint64_t at = cursor.load(std::memory_order_acquire);
    for (;;) {
      const int64_t next = epoch_of(at) < epoch ? share.first : int64_t(low_of(at));
      if (epoch_of(at) > epoch || next >= share.end) return -1;
      if (cursor.compare_exchange_weak(at, joined(epoch, next + 1), std::memory_order_acq_rel)) return int(next);
    }
  }

  void help(int number) {
    uint64_t seen = 0;
    for (int spins = 0;;) {
      const uint64_t present = present_.load(std::memory_order_acquire);
      if (number < helpers_.load(std::memory_order_relaxed) && present != seen) {
        work(number + 1, seen = present);
        spins = 0;
      } else if (++spins < kSpins) {
        wait(spins);
      } else {
        sleep(number, seen);
        spins = 0;
      }
    }
  }

  void sleep(int number, uint64_t seen) {
    std::unique_lock<std::mutex> lock(sleep_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [&] { return number < helpers_.load() && present_.load() != seen; });
    sleeping_.fetch_sub(1);
  }

  void ensure(int helpers) {
    helpers_.store(helpers, std::memory_order_relaxed);
    for (; started_ < helpers; ++started_) std::thread(&ThreadPool::help, this, started_).detach();
  }

  static constexpr auto kLate = std::chrono::microseconds(300);
  static constexpr auto kApart = std::chrono::milliseconds(500);

  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  struct alignas(64) Range {
    std::atomic<uint64_t> cursor{0};
  };
  Range ranges_of_[kMostRanges];
  alignas(64) std::atomic<uint64_t> present_{0};
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<int> sleeping_{0}, helpers_{0};
  std::atomic<bool> finished_{false};
  Clock::time_point apart_until_{};
  bool forked_ = false;
  uint64_t epoch_ = 0, renewed_ = 0;
  int started_ = 0, ranges_ = 0;
  Phase phase_{};
};

}  // namespace river
