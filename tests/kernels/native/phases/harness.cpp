#include "harness.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "allocations.h"

namespace river::checks {

Buffer::Buffer(int64_t bytes, Side side) : bytes_(bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  size_ = ceil_div(std::max<int64_t>(bytes, 1), page) * page;
  void* const all = mmap(nullptr, size_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  begin_ = static_cast<uint8_t*>(all) + page;
  if (all == MAP_FAILED || mprotect(begin_, size_, PROT_READ | PROT_WRITE)) throw std::runtime_error("no memory");
  const int64_t end = side == Side::kBehindInLines ? ceil_div(bytes, int64_t(64)) * 64 : bytes;
  data_ = side == Side::kBefore ? begin_ : begin_ + size_ - end;
  std::fill(begin_, begin_ + size_, 0xff);
}

Buffer::~Buffer() {
  const int64_t page = sysconf(_SC_PAGESIZE);
  munmap(begin_ - page, size_ + 2 * page);
}

void Buffer::poison() { std::fill(data_, data_ + bytes_, 0xff); }

bool Buffer::is_intact() const {
  const auto is_guard = [](uint8_t byte) { return byte == 0xff; };
  return std::all_of<const uint8_t*>(begin_, data_, is_guard) &&
         std::all_of<const uint8_t*>(data_ + bytes_, begin_ + size_, is_guard);
}

namespace {

template <class T>
T& added(std::vector<std::unique_ptr<Buffer>>& to, std::unique_ptr<T> made) {
  T& buffer = *made;
  to.push_back(std::move(made));
  return buffer;
}

}  // namespace

Values& Case::input(int64_t count, int32_t dtype) {
  return added(inputs_, std::make_unique<Values>(count, dtype, side()));
}

Buffer& Case::input_of(int64_t bytes) { return added(inputs_, std::make_unique<Buffer>(bytes, side())); }

Values& Case::normal(int64_t rows, int64_t columns, int64_t stride, int32_t dtype, double deviation) {
  Values& values = input((rows - 1) * stride + columns, dtype);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < columns; ++i) values.set(row * stride + i, random.normal() * deviation);
  return values;
}

Values& Case::output(int64_t count, int32_t dtype) {
  return added(outputs_, std::make_unique<Values>(count, dtype, side()));
}

Buffer& Case::workspace(int64_t bytes) {
  return added(workspaces_, std::make_unique<Buffer>(bytes, Side::kBehindInLines));
}

void Case::run(Entry entry, const void* args, int parts) {
  const Run phase = kernels.*entry;
  called_.insert(phase);
  const int64_t before = allocations();
  for (int part = parts; part-- > 0;) phase(args, part, parts);
  const int64_t made = allocations() - before;
  expect(made == 0, "a part allocated memory");
}

void Case::run_on_threads(Entry entry, const void* args, int parts) {
  const Run phase = kernels.*entry;
  called_.insert(phase);
  std::vector<std::thread> threads;
  for (int part = 0; part < parts; ++part) threads.emplace_back(phase, args, part, parts);
  for (std::thread& thread : threads) thread.join();
}

std::vector<uint8_t> Case::outcome() const {
  std::vector<uint8_t> all;
  for (const auto& output : outputs_) {
    const std::vector<uint8_t> one = output->content();
    all.insert(all.end(), one.begin(), one.end());
  }
  return all;
}

void Case::repeat(const std::function<void(int parts)>& run) {
  for (size_t i = before_.size(); i < inputs_.size(); ++i) before_.push_back(inputs_[i]->content());
  std::vector<uint8_t> first;
  for (const int parts : {3, 1, 1}) {
    for (const auto* all : {&outputs_, &workspaces_})
      for (const auto& buffer : *all) buffer->poison();
    run(parts);
    if (parts == 3)
      first = outcome();
    else
      expect(outcome() == first, "the bits of two runs, or of runs by one part and by three, differ");
  }
}

void Case::finish() {
  for (const auto* all : {&inputs_, &outputs_, &workspaces_})
    for (const auto& buffer : *all) expect(buffer->is_intact(), "memory outside of a buffer was written");
  for (size_t i = 0; i < before_.size(); ++i)
    expect(inputs_[i]->content() == before_[i], "input number " + std::to_string(i) + " was written");
}

void Case::expect(bool holds, const std::string& what) {
  if (!holds && wrong_.empty()) wrong_ = description_ + ": " + what;
}

void Case::expect_near(const char* what, int64_t i, double found, double expected, double allowed) {
  if (std::fabs(found - expected) <= allowed || found == expected || !wrong_.empty()) return;
  std::ostringstream text;
  text << what << '[' << i << "] is " << found << ", not " << expected << " within " << allowed;
  expect(false, text.str());
}

void Case::expect_same_bits(const char* what, const void* a, const void* b, int64_t bytes) {
  expect(std::memcmp(a, b, bytes) == 0, what);
}

}  // namespace river::checks
