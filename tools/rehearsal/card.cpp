// The half of a stand-in for a card that Python cannot write: memory that says "cuda" and lies on the host.
//
// Not handled: a torch that was built for CUDA, several devices, kernels (Python registers what runs in their place).

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

namespace {

const c10::Device card(c10::DeviceType::CUDA, 0);

struct Memory final : c10::Allocator {
  explicit Memory(c10::Device device) : device(device) {}
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(std::max<size_t>(bytes, 1));
    std::lock_guard<std::mutex> lock(turn);
    (device.is_cpu() ? pinned : held)[data] = bytes;
    if (!device.is_cpu()) allocated += bytes;
    return {data, data, raw_deleter(), device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  static void free(void* data) {
    {
      std::lock_guard<std::mutex> lock(turn);
      if (!pinned.erase(data)) {
        allocated -= held[data];
        held.erase(data);
      }
    }
    c10::free_cpu(data);
  }
  static bool is_pinned(const void* data) {
    std::lock_guard<std::mutex> lock(turn);
    auto next = pinned.upper_bound(const_cast<void*>(data));
    if (next == pinned.begin()) return false;
    --next;
    return static_cast<const char*>(data) < static_cast<const char*>(next->first) + next->second;
  }
  static inline std::mutex turn;
  static inline std::map<void*, size_t> pinned, held;
  static inline size_t allocated = 0;
  const c10::Device device;
};

Memory memory(card), pinned_memory(c10::DeviceType::CPU);

// Draws what the host's would draw; Python hands its state to one of the host's.
struct CardGenerator final : at::CPUGeneratorImpl {
  CardGenerator() { device_ = card; }
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return card; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return Memory::is_pinned(data); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<CardGenerator>(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::make_generator<CardGenerator>();
    return generator;
  }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   at::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA), at::dtype_or_default(dtype));
}

// The same memory, seen as the host's.
at::Tensor host(const at::Tensor& tensor) {
  auto* owner = new c10::Storage(tensor.storage());
  c10::DataPtr data(
      owner->mutable_data(), owner, [](void* kept) { delete static_cast<c10::Storage*>(kept); }, c10::kCPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), owner->nbytes(), std::move(data), nullptr, false);
  auto seen = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                       tensor.dtype());
  seen.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return seen;
}

int64_t allocated() { return Memory::allocated; }

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &memory)

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
}

TORCH_LIBRARY(rehearsal, library) {
  library.def("allocated() -> int", allocated);
  library.def("host(Tensor tensor) -> Tensor", torch::dispatch(c10::DispatchKey::CUDA, host));
}

// Importing torch has made the hooks of a build without CUDA already. Neither class has members besides its table of
// functions, so that object becomes one of ours.
const bool hooked = [] {
  static const Hooks hooks;
  static_assert(sizeof(Hooks) == sizeof(void*) && sizeof(at::CUDAHooksInterface) == sizeof(void*));
  std::memcpy(const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks()), &hooks, sizeof(void*));
  return true;
}();

}  // namespace
