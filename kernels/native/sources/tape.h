// Where the phases of an operator go: to the threads at once, or on the tape that the calling thread records.
//
// A tape holds phases with everything that their arguments point to but the tensors that the operators were given,
// which must lie where they lay. Replaying it runs all phases on the threads, without a word from Python or torch
// between.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "phases.h"
#include "runner.h"

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

class Tape {
 public:
  // The tape that this thread records, null where operators run at once.
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
  void hold(const torch::stable::Tensor& tensor) { tensors_.push_back(tensor); }
  void replay(int threads) const { Runner::instance().run(phases_.data(), int(phases_.size()), threads); }
  size_t phases() const { return phases_.size(); }
  size_t bytes() const { return bytes_; }

 private:
  std::vector<Phase> phases_;
  std::vector<Memory> memory_;
  std::vector<torch::stable::Tensor> tensors_;
  size_t bytes_ = 0;
};

// Memory that lives as long as one call's phases: the tape's, or the calling thread's, which grows and is kept.
inline char* workspace(size_t bytes) {
  if (Tape* tape = Tape::recording()) return tape->memory(bytes);
  static thread_local struct Kept {
    Memory memory;
    size_t size = 0;
  } kept;
  if (kept.size < bytes) {
    kept.memory = allocate(bytes);
    kept.size = bytes;
  }
  return kept.memory.get();
}

// Runs the phases of a call, whose arguments are `Args`, or puts them on the tape.
template <class Args>
class Call {
 public:
  explicit Call(const Args& args) : tape_(Tape::recording()) {
    args_ = tape_ ? new (tape_->memory(sizeof(Args))) Args(args) : &args;
  }

  void run(std::initializer_list<std::pair<Run, int>> phases, int threads) const {
    Phase made[4];
    int count = 0;
    for (const auto& [run, parts] : phases) made[count++] = {run, args_, parts};
    if (!tape_) return Runner::instance().run(made, count, threads);
    for (int i = 0; i < count; ++i) tape_->add(made[i]);
  }

 private:
  Tape* tape_;
  const Args* args_;
};

// Parts of a phase: as many as there is work for, four for each thread, which even out what the threads' cores are
// given.
inline int parts_of(int64_t work, int64_t least, int threads) {
  return int(std::max<int64_t>(1, std::min<int64_t>(work / least, 4 * threads)));
}

}  // namespace river
