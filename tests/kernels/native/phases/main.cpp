// Checks every phase in the table of one library of kernels against double, and prints what was checked.
//
//     phases LIBRARY [--only NAME]
//
// The exit status is 0 if every entry of the table was checked and no case failed. A library holds one instruction
// set, and the program knows none, so one program serves all libraries of an architecture. Not handled: speed.
#include <dlfcn.h>
#ifdef __x86_64__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#include "harness.h"

namespace river::checks {
namespace {

constexpr int kMessages = 3;  // of each check that failed

std::vector<Check> all_checks() {
  std::vector<Check> all;
  for (auto* some : {prepare_checks, gemm_checks, experts_checks, cache_checks, attention_checks, logits_checks})
    for (Check& check : some()) all.push_back(std::move(check));
  return all;
}

uint32_t seed_of(const std::string& name, int number) {
  uint32_t seed = 2166136261u;
  for (const char c : name) seed = (seed ^ uint8_t(c)) * 16777619u;
  return seed + uint32_t(number);
}

// The case that runs, for a message if it ends the program.
struct Running {
  const char* check;
  int number;
  const Case* one;
} running;

void name_running() {
  if (!running.one) return;
  std::printf("%s, case %d, %s: ended the program\n", running.check, running.number,
              running.one->description().c_str());
  std::fflush(stdout);
}

#ifdef __SANITIZE_ADDRESS__
void name_what_ends() { __sanitizer_set_death_callback(name_running); }
#else
void name_what_ends() {
  for (const int wrong : {SIGSEGV, SIGBUS, SIGFPE})
    std::signal(wrong, [](int signal) {
      name_running();
      std::signal(signal, SIG_DFL);
      std::raise(signal);
    });
}
#endif

struct Outcome {
  int checked = 0, failed = 0;
  bool complete = false;  // whether some case ran each entry
};

Outcome outcome_of(const Check& check, const Kernels& kernels) {
  Outcome outcome;
  std::set<Run> called;
  for (int number = 0; number < check.cases; ++number) {
    Case one(kernels, seed_of(check.name, number));
    running = {check.name.c_str(), number, &one};
    check.run(one);
    one.finish();
    running = {};
    called.insert(one.called().begin(), one.called().end());
    ++outcome.checked;
    if (one.wrong().empty()) continue;
    if (outcome.failed++ < kMessages) std::printf("%s, case %d, %s\n", check.name.c_str(), number, one.wrong().c_str());
  }
  outcome.complete = outcome.checked > 0;
  for (const Entry entry : check.entries) outcome.complete &= called.count(kernels.*entry) > 0;
  return outcome;
}

// How many entries of the table, which begins with them, no check names.
int entries_without_check(const Kernels& kernels, const std::vector<Check>& checks) {
  std::set<Run> named;
  for (const Check& check : checks)
    for (const Entry entry : check.entries) named.insert(kernels.*entry);
  const Run* entries = &kernels.prepare;
  int without = 0;
  for (size_t i = 0; i < offsetof(Kernels, bfloat16) / sizeof(Run); ++i) without += !named.count(entries[i]);
  return without;
}

int check_all(const Kernels& kernels, const std::string& only) {
  const std::vector<Check> checks = all_checks();
  int done = 0, all = only.empty() ? entries_without_check(kernels, checks) : 0, failed = 0;
  std::printf("%-24s %6s %8s %7s %7s\n", "kernel", "cases", "checked", "failed", "seconds");
  for (const Check& check : checks) {
    if (!only.empty() && check.name != only) continue;
    const auto start = std::chrono::steady_clock::now();
    const Outcome outcome = outcome_of(check, kernels);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%-24s %6d %8d %7d %7.2f\n", check.name.c_str(), check.cases, outcome.checked, outcome.failed, seconds);
    std::fflush(stdout);
    ++all;
    done += outcome.complete;
    failed += outcome.failed;
  }
  std::printf("%d of %d kernels checked, %d cases failed\n", done, all, failed);
  return done == all && all > 0 && failed == 0 ? 0 : 1;
}

// Asks the system for AMX tiles, as torch.cpu._init_amx does; without its permission they are illegal instructions.
void permit_tiles() {
#ifdef __x86_64__
  constexpr long kRequest = 0x1023, kTiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  syscall(SYS_arch_prctl, kRequest, kTiles);      // (a library without tiles does not need it)
#endif
}

int main_of(const std::vector<std::string>& arguments) {
  std::string library, only;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--only" && i + 1 < arguments.size())
      only = arguments[++i];
    else
      library = arguments[i];
  }
  void* const loaded = library.empty() ? nullptr : dlopen(library.c_str(), RTLD_NOW);
  void* const table = loaded ? dlsym(loaded, "river_kernels") : nullptr;
  if (!table) {
    std::fprintf(stderr, "%s\nusage: phases LIBRARY [--only NAME]\n", library.empty() ? "" : dlerror());
    return 2;
  }
  permit_tiles();
  name_what_ends();
  return check_all(*reinterpret_cast<const Kernels* (*)()>(table)(), only);
}

}  // namespace
}  // namespace river::checks

int main(int count, char** arguments) { return river::checks::main_of({arguments + 1, arguments + count}); }
