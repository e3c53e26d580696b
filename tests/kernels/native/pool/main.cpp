// Runs random phases on the thread pool and checks that each part runs once, after the phase before it.
//
//     pool SECONDS SEED
//
// Parts write plain memory that parts of later phases read, so ThreadSanitizer sees a barrier that is none. Two callers
// run at a time; numbers of threads change; a loop of the stand-in for torch ends late now and then, so the pool's own
// threads help. Not handled: forks, speed.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "operators/thread_pool.h"

namespace river {
namespace {

constexpr int kMost = 500;  // parts of most phases

// One phase of several: every part adds one to its number, and sees what all parts of the phase before have made.
struct Step {
  std::vector<int>* mine;
  const std::vector<int>* before;  // null for the first phase
  std::atomic<int>* wrong;

  static void run(const void* args, int part, int parts) {
    const auto& a = *static_cast<const Step*>(args);
    if (a.before)
      for (size_t i = part % 7; i < a.before->size(); i += 7) *a.wrong += (*a.before)[i] != 1;
    *a.wrong += int(a.mine->size()) != parts;
    ++(*a.mine)[part];
  }
};

int64_t run_random(std::mt19937& engine, std::atomic<int>& wrong) {
  const auto draw = [&](int least, int most) { return least + int(engine() % uint32_t(most - least + 1)); };
  const int count = draw(1, 12);
  std::vector<std::vector<int>> numbers(count);
  std::vector<Step> steps(count);
  std::vector<Phase> phases;
  for (int i = 0; i < count; ++i) {
    const int parts = draw(0, 200) == 0 ? ThreadPool::kMostParts : draw(0, 3) ? draw(0, 12) : draw(13, kMost);
    numbers[i].assign(parts, 0);
    steps[i] = {&numbers[i], i ? &numbers[i - 1] : nullptr, &wrong};
    phases.push_back({Step::run, &steps[i], parts});
  }
  ThreadPool::instance().run(phases.data(), count, draw(1, 5));
  for (const auto& each : numbers)
    for (const int times : each) wrong += times != 1;
  return count;
}

// Phases of too many parts are an error, whatever runs before them, and none of them runs.
bool refuses_too_many() {
  std::atomic<int> wrong{0};
  for (const int parts : {ThreadPool::kMostParts + 1, 1 << 20})
    for (const int threads : {1, 3}) {
      std::vector<int> few(4), many(parts);
      const Step first{&few, nullptr, &wrong}, second{&many, &few, &wrong};
      const Phase phases[] = {{Step::run, &first, 4}, {Step::run, &second, parts}};
      try {
        ThreadPool::instance().run(phases, 2, threads);
        return false;
      } catch (const std::runtime_error& error) {
        if (std::string(error.what()).find("parts") == std::string::npos || few[0]) return false;
      }
    }
  return wrong == 0;
}

int main_of(double seconds, uint32_t seed) {
  const bool refuses = refuses_too_many();
  std::atomic<int> wrong{0};
  std::atomic<int64_t> phases{0};
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  const auto call = [&](uint32_t number) {
    std::mt19937 engine(seed + number);
    do phases += run_random(engine, wrong);
    while (std::chrono::steady_clock::now() < end && wrong == 0);
  };
  std::thread second(call, 1);
  call(0);
  second.join();
  std::printf("%lld phases, %d wrong, too many parts %s\n", (long long)phases, wrong.load(),
              refuses ? "refused" : "not refused");
  return wrong == 0 && refuses ? 0 : 1;
}

}  // namespace
}  // namespace river

int main(int count, char** arguments) {
  return count == 3 ? river::main_of(std::atof(arguments[1]), uint32_t(std::atoi(arguments[2]))) : 2;
}
