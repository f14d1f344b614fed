/* A device by torch's PrivateUse1 key that keeps its tensors in host memory: what runs on it has never mixed devices.
   Every operation is computed by the CPU's kernel, after a check that all its tensors are on this device. */

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

namespace {

constexpr auto DEVICE = c10::DeviceType::PrivateUse1;

/* There are two of the device. */
struct Memory final : c10::Allocator {
    const c10::Device device;
    explicit Memory(c10::DeviceIndex index) : device(DEVICE, index) {}
    c10::DataPtr allocate(size_t bytes) override {
        void *place = bytes ? c10::alloc_cpu(bytes) : nullptr;
        return {place, place, &c10::free_cpu, device};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
    void copy_data(void *to, const void *from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Memory memories[] = {Memory(0), Memory(1)};
REGISTER_ALLOCATOR(DEVICE, &memories[0])

c10::Allocator *memory_of(std::optional<c10::Device> device) {
    return &memories[device && device->index() > 0 ? device->index() : 0];
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, c10::impl::NoOpDeviceGuardImpl<DEVICE>)

struct Hooks final : at::PrivateUse1HooksInterface {
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::Allocator *getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
    bool isPinnedPtr(const void *) const override { return false; }
};

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), memory_of(device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                     c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
    return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), memory_of(device),
                                             c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                             c10::dtype_or_default(dtype));
}

/* The same memory as a tensor of the CPU. */
at::Tensor on_cpu(const at::Tensor &tensor) {
    if (tensor.is_cpu()) return tensor;
    void *place = const_cast<void *>(tensor.const_data_ptr());
    return at::from_blob(place, tensor.sizes(), tensor.strides(), tensor.options().device(c10::kCPU));
}

at::Tensor copy_from(const at::Tensor &self, const at::Tensor &to, bool) {
    on_cpu(to).copy_(on_cpu(self));
    return to;
}

at::Tensor copy_from_and_resize(const at::Tensor &self, const at::Tensor &to) {
    if (to.sizes() != self.sizes()) to.resize_(self.sizes());
    return copy_from(self, to, false);
}

at::Tensor &set_storage(at::Tensor &self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
    return at::native::set_storage_cpu_(self, source, offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
                                        C10_AS_INTARRAYREF_SLOW(stride));
}

at::Scalar local_scalar_dense(const at::Tensor &self) { return on_cpu(self).item(); }

void check(const c10::OperatorHandle &op, std::optional<c10::Device> &device, const at::Tensor &tensor) {
    // Numbers may be tensors of the CPU with no dimension, as for every device.
    if (!tensor.defined() || (tensor.is_cpu() && tensor.dim() == 0)) return;
    if (!device) device = tensor.device();
    TORCH_CHECK(!tensor.is_cpu() && tensor.device() == *device, op.schema().name(), ": mixes devices: tensors are on ",
                *device, " and ", tensor.device());
}

void fallback(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
    std::optional<c10::Device> device;
    auto arguments = torch::jit::last(stack, op.schema().arguments().size());
    for (const auto &argument : arguments) {
        if (argument.isTensor()) check(op, device, argument.toTensor());
        if (argument.isTensorList())
            for (const at::Tensor &tensor : argument.toTensorVector()) check(op, device, tensor);
        if (argument.isOptionalTensorList())
            for (const std::optional<at::Tensor> &tensor : argument.toOptionalTensorVector())
                if (tensor) check(op, device, *tensor);
    }
    at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", &empty);
    m.impl("empty_strided", &empty_strided);
    m.impl("_copy_from", &copy_from);
    m.impl("_copy_from_and_resize", &copy_from_and_resize);
    m.impl("_local_scalar_dense", &local_scalar_dense);
    m.impl("as_strided", at::native::as_strided_tensorimpl);
    m.impl("_reshape_alias", at::native::_reshape_alias);
    m.impl("view", at::native::view);
    m.impl("resize_", at::native::resize_);
    m.impl("set_.source_Storage_storage_offset", &set_storage);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    static Hooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
}
