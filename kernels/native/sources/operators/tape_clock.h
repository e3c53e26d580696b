// A replay that reads the clock around each part of each phase, to show where a token's time goes. Phases are
// told apart by their functions. A part takes some 50 ns longer than in a replay without clock.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "operators/tape.h"
#include "operators/tensors.h"

namespace river {

enum TimedKind : int64_t { kOtherPhase, kPreparePhase, kGemmPhase, kKvFillPhase, kAttentionPhase, kRescorePhase };
constexpr int kTimedColumns = 9;

// A phase that is timed in place of another: when its first part began and its last one ended, and how long this thread
// and others ran its parts, in nanoseconds.
struct TimedPhase {
  Phase of;
  std::thread::id caller;
  std::atomic<int64_t> begin{INT64_MAX}, end{0}, mine{0}, others{0};

  static int64_t now() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

  static void run(const void* args, int part, int parts) {
    auto& timed = *const_cast<TimedPhase*>(static_cast<const TimedPhase*>(args));
    const int64_t began = now();
    timed.of.run(timed.of.args, part, parts);
    const int64_t ended = now();
    for (int64_t least = timed.begin; began < least && !timed.begin.compare_exchange_weak(least, began);) continue;
    for (int64_t most = timed.end; ended > most && !timed.end.compare_exchange_weak(most, ended);) continue;
    (std::this_thread::get_id() == timed.caller ? timed.mine : timed.others) += ended - began;
  }
};

inline int64_t kind_of(const Phase& phase) {
  const Kernels& k = kernels();
  if (phase.run == k.prepare) return kPreparePhase;
  if (phase.run == k.gemm) return kGemmPhase;
  if (phase.run == k.kv_fill) return kKvFillPhase;
  if (phase.run == k.attend || phase.run == k.combine) return kAttentionPhase;
  return phase.run == k.rescore ? kRescorePhase : kOtherPhase;
}

// Returns [phases, 9] int64s: kind, parts, bits of a matmul's weights, its output and input features, and the
// nanoseconds of `TimedPhase`.
inline Tensor replay_timed(const Tape& tape) {
  const std::vector<Phase>& phases = tape.recorded();
  const auto timed = std::make_unique<TimedPhase[]>(phases.size());
  std::vector<Phase> run;
  for (size_t i = 0; i < phases.size(); ++i) {
    timed[i].of = phases[i];
    timed[i].caller = std::this_thread::get_id();
    run.push_back({TimedPhase::run, &timed[i], phases[i].parts});
  }
  tape.replay(run, threads());
  const int64_t sizes[] = {int64_t(phases.size()), kTimedColumns};
  Tensor out = empty(sizes, 2, aoti_torch_dtype_int64());
  auto* row = static_cast<int64_t*>(out.data_ptr());
  for (size_t i = 0; i < phases.size(); ++i, row += kTimedColumns) {
    const TimedPhase& t = timed[i];
    std::fill(row, row + kTimedColumns, 0);
    row[0] = kind_of(t.of);
    row[1] = t.of.parts;
    if (row[0] == kGemmPhase) {
      const auto& gemm = *static_cast<const GemmArgs*>(t.of.args);
      row[2] = gemm.palette ? 12 : gemm.in_8_bits ? 8 : gemm.scale_zero ? 4 : 8 * bytes_of(gemm.epilogue.dtype);
      row[3] = gemm.epilogue.out_features;
      row[4] = gemm.in_features;
    }
    row[5] = t.begin, row[6] = t.end, row[7] = t.mine, row[8] = t.others;
  }
  return out;
}

}  // namespace river
