#include "allocations.h"

#include <cstdlib>
#include <new>

namespace {
thread_local int64_t count = 0;
}

#ifndef __SANITIZE_ADDRESS__
void* operator new(std::size_t bytes) {
  ++count;
  if (void* const memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
#endif

namespace river::checks {

int64_t allocations() { return count; }

}  // namespace river::checks
