// One case of a check: buffers at pages without access, runs of a phase by several parts, and what was wrong.
#pragma once

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "numbers.h"

namespace river::checks {

using Entry = Run Kernels::*;
using Doubles = std::vector<double>;

// Where a buffer lies between its pages without access. Lines are of 64 bytes.
enum class Side { kBehind, kBefore, kBehindInLines };  // it ends at one, begins at one, or ends a line or less before

// Memory between pages without access: a phase that reads or writes them ends with SIGSEGV. What else is on the
// buffer's own pages is a guard zone. All bytes are 0xFF at first: NaN as a float, -1 as an integer.
class Buffer {
 public:
  Buffer(int64_t bytes, Side side);
  virtual ~Buffer();
  Buffer(const Buffer&) = delete;

  template <class T = void>
  T* data() {
    return reinterpret_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }
  void poison();
  bool is_intact() const;
  std::vector<uint8_t> content() const { return {data_, data_ + bytes_}; }

 private:
  int64_t bytes_, size_;    // of the data, and of the pages with access
  uint8_t *begin_, *data_;  // of those pages
};

// Numbers of one dtype in such memory.
class Values : public Buffer {
 public:
  Values(int64_t count, int32_t dtype, Side side) : Buffer(count * size_of(dtype), side), dtype_(dtype) {}

  double at(int64_t i) { return value_of(data(), i, dtype_); }
  void set(int64_t i, double value) { set_value(data(), i, dtype_, value); }
  void* from(int64_t i) { return data<char>() + i * size_of(dtype_); }

 private:
  int32_t dtype_;
};

class Case {
 public:
  Case(const Kernels& kernels, uint32_t seed) : kernels(kernels), random(seed) {}

  // Memory that a phase reads only; values are NaN until they are set.
  Values& input(int64_t count, int32_t dtype);
  Buffer& input_of(int64_t bytes);
  // Random values, rows `stride` apart with NaN between them.
  Values& normal(int64_t rows, int64_t columns, int64_t stride, int32_t dtype, double deviation = 1);
  // Memory that is poisoned before each run; outputs have the same bits after each one. Workspaces begin at a line.
  Values& output(int64_t count, int32_t dtype);
  Buffer& workspace(int64_t bytes);

  // Runs all parts of a phase, the last one first; none may allocate memory.
  void run(Entry entry, const void* args, int parts);
  // Runs all parts at the same time, each on a separate thread.
  void run_on_threads(Entry entry, const void* args, int parts);
  // Calls `run(parts)` twice for one part and once for three, and compares the outputs.
  void repeat(const std::function<void(int parts)>& run);
  // Compares all guard zones and inputs with what they were.
  void finish();

  template <class... T>
  void describe(const T&... what) {
    ((description_ += text_of(what)), ...);
  }
  void expect(bool holds, const std::string& what);
  // Whether `found` lies within `allowed` of `expected`.
  void expect_near(const char* what, int64_t i, double found, double expected, double allowed);
  void expect_same_bits(const char* what, const void* a, const void* b, int64_t bytes);

  const std::string& description() const { return description_; }
  const std::string& wrong() const { return wrong_; }  // the first thing, empty if there is none
  const std::set<Run>& called() const { return called_; }

  const Kernels& kernels;
  Random random;

 private:
  static std::string text_of(const char* text) { return text; }
  static std::string text_of(int64_t number) { return std::to_string(number); }

  Side side() { return random.one_in(4) ? Side::kBefore : Side::kBehind; }
  std::vector<uint8_t> outcome() const;

  std::vector<std::unique_ptr<Buffer>> inputs_, outputs_, workspaces_;
  std::vector<std::vector<uint8_t>> before_;  // the contents of inputs
  std::set<Run> called_;
  std::string description_, wrong_;
};

// Some cases of one kernel, or of one form of it, and the entries of the table that it runs.
struct Check {
  std::string name;
  std::vector<Entry> entries;
  int cases;
  std::function<void(Case&)> run;
};

std::vector<Check> prepare_checks();
std::vector<Check> gemm_checks();
std::vector<Check> experts_checks();
std::vector<Check> cache_checks();
std::vector<Check> attention_checks();
std::vector<Check> logits_checks();

}  // namespace river::checks
