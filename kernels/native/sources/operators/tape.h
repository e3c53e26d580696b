// Phases of an operator run on the threads, or are added to the tape that the calling thread records, with all that
// their arguments point to, except the operators' tensors, which must keep their addresses.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "operators/thread_pool.h"
#include "phases.h"

namespace river {

struct Freed {
  void operator()(char* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Freed>;

inline Memory allocate(size_t bytes) {
  Memory memory(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// Memory that grows and is kept.
class Kept {
 public:
  char* room(size_t bytes) {
    if (size_ < bytes) memory_ = allocate(bytes), size_ = bytes;
    return memory_.get();
  }

 private:
  Memory memory_;
  size_t size_ = 0;
};

// Pieces for as many parts as torch has threads, in the calling thread's memory; those of its next call are the same.
inline Pieces pieces_of(int64_t each) {
  static thread_local Kept kept;
  Pieces pieces{nullptr, int32_t(torch::stable::get_num_threads()), each};
  pieces.flags = reinterpret_cast<int32_t*>(kept.room(pieces.bytes()));
  std::fill(pieces.flags, pieces.flags + pieces.count, 0);
  return pieces;
}

class Tape {
 public:
  // The tape that this thread records, null if operators run immediately.
  static Tape*& recording() {
    static thread_local Tape* tape = nullptr;
    return tape;
  }

  char* memory(size_t bytes) {
    memory_.push_back(allocate(bytes));
    bytes_ += bytes;
    return memory_.back().get();
  }
  void add(const Phase& phase) { phases_.push_back(phase); }
  // Pieces of `each` bytes or more, which each replay takes from its thread.
  const Pieces* pieces(int64_t each) {
    pieces_.each = std::max(pieces_.each, each);
    return &pieces_;
  }
  void hold(const torch::stable::Tensor& tensor) { tensors_.push_back(tensor); }
  // After each replay `failed` must be 0; else the replay says `what`.
  void watch(int32_t* failed, const char* what) { watched_.push_back({failed, what}); }
  void replay(int threads) const { replay(phases_, threads); }
  // `phases`: the tape's, or others in their place.
  void replay(const std::vector<Phase>& phases, int threads) const {
    if (pieces_.each) pieces_ = pieces_of(pieces_.each);
    ThreadPool::instance().run(phases.data(), int(phases.size()), threads);
    const char* wrong = nullptr;
    for (const Watched& watched : watched_)  // (each is set back, whichever the error names)
      if (std::exchange(*watched.failed, 0) && !wrong) wrong = watched.what;
    STD_TORCH_CHECK(!wrong, wrong);
  }
  const std::vector<Phase>& recorded() const { return phases_; }
  size_t bytes() const { return bytes_; }

 private:
  struct Watched {
    int32_t* failed;
    const char* what;
  };
  std::vector<Phase> phases_;
  std::vector<Watched> watched_;
  std::vector<Memory> memory_;
  std::vector<torch::stable::Tensor> tensors_;
  size_t bytes_ = 0;
  mutable Pieces pieces_{};
};

// Memory that lives as long as one call's phases: the tape's, or the calling thread's, which grows and is kept.
inline char* workspace(size_t bytes) {
  if (Tape* tape = Tape::recording()) return tape->memory(bytes);
  static thread_local Kept kept;
  return kept.room(bytes);
}

// If torch has its default number of threads on a machine with slow cores, or more: the fast cores alone. All zero
// without slow cores.
inline std::atomic<int> all_cores{0}, fast_cores{0};

inline int threads() {
  const int given = int(torch::stable::get_num_threads()), all = all_cores.load(std::memory_order_relaxed);
  return all && given >= all ? fast_cores.load(std::memory_order_relaxed) : given;
}

// Parts of a phase, of at least `least` work each, and at most four for each thread, for load balance.
inline int parts_of(int64_t work, int64_t least) {
  return int(std::max<int64_t>(1, std::min<int64_t>(work / least, 4 * threads())));
}

// Runs phases or records them with a copy of `args`; between calls of a library on torch's threads, which still spin.
template <class Args>
void run_phases(const Args& args, std::initializer_list<Phase> phases, bool beside_library = false) {
  if (Tape* tape = Tape::recording()) {
    const auto* copy = reinterpret_cast<const char*>(new (tape->memory(sizeof(Args))) Args(args));
    for (Phase phase : phases) {
      phase.args = copy + (static_cast<const char*>(phase.args) - reinterpret_cast<const char*>(&args));
      tape->add(phase);
    }
  } else if (!beside_library) {
    ThreadPool::instance().run(phases.begin(), int(phases.size()), threads());
  } else {
    for (const Phase& phase : phases)
      torch::stable::parallel_for(0, phase.parts, 1, [&](int64_t first, int64_t end) {
        for (int64_t part = first; part < end; ++part) phase.run(phase.args, int(part), phase.parts);
      });
  }
}

// What the phases of a call noted as wrong becomes an error: immediately, or after each replay of the tape.
inline void expect_zero(int32_t* failed, const char* what) {
  if (Tape* tape = Tape::recording())
    tape->watch(failed, what);
  else
    STD_TORCH_CHECK(!*failed, what);
}

}  // namespace river
