// Counts what the calling thread allocated with `new`, in libraries too. Not handled: malloc; with AddressSanitizer,
// which has its own `new`, nothing is counted.
#pragma once

#include <cstdint>

namespace river::checks {

int64_t allocations();

}  // namespace river::checks
