// A stand-in accelerator: PyTorch's PrivateUse1 backend over the CPU's memory and kernels.
//
// It refuses what CUDA refuses (operations over tensors of two devices, the CPU's generators), and, where asked, float64
// and the operations that Apple's MPS lacks. It has random generators of its own, and counts what makes a host wait. It
// is synchronous, and rounds as the CPU does.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/is_set_to_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;

long counts[5] = {0, 0, 0, 0, 0};
enum Count { SYNCHRONISATIONS, TO_HOST, TO_DEVICE, OPERATORS, PINNED };
bool has_float64 = true;
thread_local int current = 0;
thread_local int depth = 0;  // inside of an operation, what the fallback does itself is not counted

struct Inside {
  Inside() { depth++; }
  ~Inside() { depth--; }
};

void count(Count what) { if (!depth) counts[what]++; }

void refuse_float64(at::ScalarType type) {
  TORCH_CHECK_TYPE(has_float64 || (type != at::kDouble && type != at::kComplexDouble),
                   "Cannot convert a standin Tensor to float64 dtype as this device doesn't support float64.");
}

// ---- memory, the present device, events ----------------------------------------------------------------------------

struct Memory final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    return {data, data, &std::free, at::Device(kDevice, current)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(kDevice, &memory);

// The host's memory that a device copies from without being waited for.
struct Pinned final : at::Allocator {
  static std::set<const void*>& all() { static std::set<const void*> found; return found; }
  static void free(void* data) { all().erase(data); std::free(data); }
  at::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    if (data) all().insert(data);
    return {data, data, &free, at::Device(c10::DeviceType::CPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Pinned pinned;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Device = c10::Device;
  using Stream = c10::Stream;
  c10::DeviceType type() const override { return kDevice; }
  Device exchangeDevice(Device to) const override { Device old = getDevice(); setDevice(to); return old; }
  Device getDevice() const override { return Device(kDevice, current); }
  void setDevice(Device to) const override { if (to.has_index()) current = to.index(); }
  void uncheckedSetDevice(Device to) const noexcept override { if (to.has_index()) current = to.index(); }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device.has_index() ? device : getDevice()); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  void record(void**, const Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { count(SYNCHRONISATIONS); }
  void synchronizeEvent(void*) const override { count(SYNCHRONISATIONS); }
  void synchronizeDevice(c10::DeviceIndex) const override { count(SYNCHRONISATIONS); }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- random generators ---------------------------------------------------------------------------------------------

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(int index) {
    device_ = at::Device(kDevice, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

int index_or_current(c10::DeviceIndex index) { return index < 0 ? current : index; }

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current = index; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { auto old = current; current = index; return old; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    static at::Generator defaults[kDevices] = {at::make_generator<Generator>(0), at::make_generator<Generator>(1)};
    return defaults[index_or_current(index)];
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  bool isPinnedPtr(const void* data) const override { return Pinned::all().count(data) > 0; }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<Generator>(index_or_current(index));
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::DataPtr larger = memory.allocate(bytes);
    std::memcpy(larger.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(bytes);
  }
};
const bool registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

// While it lives, the CPU's default generator draws the numbers of a device's.
struct Borrowed {
  at::Generator device, cpu = at::globalContext().defaultGenerator(at::kCPU);
  at::Tensor own;
  explicit Borrowed(at::Generator of) : device(std::move(of)), own(cpu.get_state()) { cpu.set_state(device.get_state()); }
  ~Borrowed() { device.set_state(cpu.get_state()); cpu.set_state(own); }
};

// ---- tensors -------------------------------------------------------------------------------------------------------

at::Tensor on_cpu(const at::Tensor& tensor) {  // the same memory
  if (!tensor.defined() || tensor.device().type() != kDevice) return tensor;
  static char nothing[64];
  void* data = tensor.numel() ? tensor.data_ptr() : static_cast<void*>(nothing);
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  auto found = at::from_blob(data, tensor.sizes(), tensor.strides(), options);
  if (tensor.is_conj()) found = found.conj();
  return tensor.is_neg() ? at::_neg_view(found) : found;
}

int index_of(std::optional<at::Device> device) { return device && device->has_index() ? device->index() : current; }

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  auto dtype = type.value_or(at::typeMetaToScalarType(at::get_default_dtype()));
  refuse_float64(dtype);
  c10::DeviceGuard guard(at::Device(kDevice, index_of(device)));
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype, format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> type,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  auto dtype = type.value_or(at::typeMetaToScalarType(at::get_default_dtype()));
  refuse_float64(dtype);
  c10::DeviceGuard guard(at::Device(kDevice, index_of(device)));
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (!to.is_privateuseone()) {
    count(TO_HOST);
  } else if (!from.is_privateuseone()) {
    count(TO_DEVICE);
    if (non_blocking && Pinned::all().count(from.storage().data())) count(PINNED);
  }
  if (from.is_privateuseone()) refuse_float64(to.scalar_type());  // MPS casts before it copies
  Inside inside;
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar read_number(const at::Tensor& tensor) {
  count(SYNCHRONISATIONS);
  return on_cpu(tensor).item();
}

const at::Tensor& resize(const at::Tensor& tensor, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(tensor, size, format);
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  auto contiguous = c10::contiguous_strides(size);
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride.empty() ? contiguous : stride, offset);
  return tensor;
}

at::Tensor& set_whole_storage(at::Tensor& tensor, at::Storage storage) {
  int64_t entries = storage.nbytes() / tensor.itemsize();
  return set_storage(tensor, storage, 0, {entries}, {});
}

at::Tensor& set_tensor(at::Tensor& tensor, const at::Tensor& other) {
  return set_storage(tensor, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

bool may_replace(const at::Tensor& tensor, const at::Tensor& other) {  // `tensor.data = other`, as CUDA lets one do
  return tensor.layout() == at::kStrided && other.layout() == at::kStrided;
}

// ---- everything else: checks, then the CPU's kernel ----------------------------------------------------------------

// Operations that wait for the device on CUDA: the size of what they return, or whether they succeed, depends on values.
const std::set<std::string> kWaits = {
    "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::bincount", "aten::repeat_interleave",
    "aten::_linalg_eigh", "aten::linalg_eig", "aten::_linalg_svd", "aten::cholesky", "aten::linalg_lstsq"};

// Operations that CUDA refuses where only deterministic ones are allowed; the second some versions of it, with fractions.
const std::set<std::string> kNondeterministic = {"aten::put_", "aten::cumsum", "aten::kthvalue", "aten::histc",
                                                 "aten::nll_loss2d_forward", "aten::median"};

void refuse_nondeterministic(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const std::string& name = op.schema().name();
  const c10::IValue& first = stack[stack.size() - op.schema().arguments().size()];
  bool exact = name == "aten::cumsum" && first.isTensor() && !first.toTensor().is_floating_point();
  bool whole = name == "aten::median" && op.schema().overload_name().empty();
  if (kNondeterministic.count(name) && !exact && !whole) at::globalContext().alertNotDeterministic(name);
}

// Operations that Apple's MPS, which has no float64 either, does not have.
const std::set<std::string> kLacking = {
    "aten::_linalg_eigh", "aten::linalg_eig", "aten::_linalg_svd", "aten::linalg_qr", "aten::linalg_lstsq",
    "aten::geqrf", "aten::cholesky_solve", "aten::linalg_lu_solve", "aten::logcumsumexp", "aten::kthvalue"};

struct Arguments {
  std::string name;
  bool by_index;
  std::set<int> devices;
  std::string on_host;  // the argument that is a tensor of the CPU, if one is
  std::optional<at::Generator> generator;

  void look(const at::Tensor& tensor, const std::string& argument, bool number_allowed, bool index) {
    if (!tensor.defined()) return;
    if (tensor.is_privateuseone()) {
      devices.insert(tensor.device().index());
    } else if (!index && !(number_allowed && tensor.dim() == 0)) {
      on_host = argument;
    } else if (index && tensor.is_cpu()) {
      count(TO_DEVICE);
    }
  }
};

Arguments read(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  Arguments found;
  const auto& arguments = op.schema().arguments();
  found.name = op.schema().name();
  found.by_index = found.name.find("index_put") != std::string::npos || found.name == "aten::index" || found.name == "aten::_unsafe_index";
  for (size_t i = 0; i < arguments.size(); i++) {
    const c10::IValue& value = stack[stack.size() - arguments.size() + i];
    const std::string& name = arguments[i].name();
    if (value.isTensor()) found.look(value.toTensor(), name, true, false);
    else if (value.isTensorList()) for (const at::Tensor& t : value.toTensorList()) found.look(t, name, false, false);
    else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList())
        if (t.has_value()) found.look(*t, name, true, found.by_index);
    } else if (value.isGenerator()) found.generator = value.toGenerator();
    else if (value.isDevice() && value.toDevice().type() == kDevice) found.devices.insert(index_of(value.toDevice()));
  }
  return found;
}

void check(const Arguments& arguments) {
  TORCH_CHECK(arguments.devices.empty() || arguments.on_host.empty(), "Expected all tensors to be on the same device, "
              "but found at least two devices, standin:0 and cpu! (argument ", arguments.on_host, " of ", arguments.name, ")");
  TORCH_CHECK(arguments.devices.size() < 2, "Expected all tensors to be on the same device, but found at least two "
              "devices, standin:0 and standin:1! (", arguments.name, ")");
  TORCH_CHECK(!arguments.generator || !arguments.generator->device().is_cpu() || arguments.devices.empty(),
              "Expected a 'standin' device type for generator but found 'cpu' in ", arguments.name);
}

void on_cpu_kernels(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments arguments = read(op, *stack);
  check(arguments);
  bool lacking = !has_float64 && !arguments.devices.empty() && kLacking.count(arguments.name);
  TORCH_CHECK_NOT_IMPLEMENTED(!lacking, "The operator '", arguments.name,
                              "' is not currently implemented for the standin device.");
  refuse_nondeterministic(op, *stack);
  count(OPERATORS);
  bool size_is_given = arguments.name == "aten::repeat_interleave" && !stack->back().isNone();
  if (kWaits.count(arguments.name) && !size_is_given) count(SYNCHRONISATIONS);
  int index = arguments.devices.empty() ? current : *arguments.devices.begin();
  c10::DeviceGuard guard(at::Device(kDevice, index));
  Inside inside;
  std::optional<Borrowed> drawing;
  if (op.hasTag(at::Tag::nondeterministic_seeded)) {
    const auto& all = op.schema().arguments();
    for (size_t i = 0; i < all.size(); i++) {
      c10::IValue& value = (*stack)[stack->size() - all.size() + i];
      if (value.isGenerator()) value = c10::IValue();
    }
    drawing.emplace(arguments.generator ? *arguments.generator : at::detail::getPrivateUse1Hooks().getDefaultGenerator(index));
  }
  at::native::cpu_fallback(op, stack, /*error_on_views=*/false);
}

void same_device(std::initializer_list<at::Tensor> tensors, const char* name) {
  Arguments arguments;
  arguments.name = name;
  for (const at::Tensor& tensor : tensors) arguments.look(tensor, "a tensor", false, false);
  check(arguments);
  count(OPERATORS);
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  same_device({input, weight, bias.value_or(at::Tensor())}, "aten::convolution");
  Inside inside;
  std::optional<at::Tensor> b;
  if (bias && bias->defined()) b = on_cpu(*bias);
  return at::convolution(on_cpu(input), on_cpu(weight), b, stride, padding, dilation, transposed, output_padding, groups)
      .to(input.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> mask) {
  same_device({gradient, input, weight}, "aten::convolution_backward");
  Inside inside;
  std::vector<int64_t> bias{gradient.size(1)};
  auto [to_input, to_weight, to_bias] = at::convolution_backward(
      on_cpu(gradient), on_cpu(input), on_cpu(weight), at::OptionalIntArrayRef(bias), stride, padding, dilation,
      transposed, output_padding, groups, mask);
  auto back = [&](const at::Tensor& t) { return t.defined() ? t.to(input.device()) : t; };
  return {back(to_input), back(to_weight), back(to_bias)};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("unfold", at::native::unfold);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("is_set_to", at::native::is_set_to);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", read_number);
  m.impl("_has_compatible_shallow_copy_type", may_replace);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu_kernels>());
}

// What `torch.autocast` computes in 16 bits; all else is in the type of its operands.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv1d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
}

const at::Generator& generator(int64_t index) { return at::detail::getPrivateUse1Hooks().getDefaultGenerator(index); }

// `torch.ops.standin`
TORCH_LIBRARY(standin, m) {
  m.def("count(int what) -> int", [](int64_t what) { return static_cast<int64_t>(counts[what]); });
  m.def("reset() -> ()", [] { std::memset(counts, 0, sizeof counts); });
  m.def("set_float64(bool available) -> ()", [](bool available) { has_float64 = available; });
  m.def("device() -> int", [] { return static_cast<int64_t>(current); });
  m.def("set_device(int index) -> ()", [](int64_t index) { current = index; });
  m.def("seed(int index, int seed) -> ()", [](int64_t index, int64_t seed) { at::Generator(generator(index)).set_current_seed(seed); });
  m.def("rng_state(int index) -> Tensor", [](int64_t index) { return generator(index).get_state(); });
  m.def("set_rng_state(int index, Tensor state) -> ()", [](int64_t index, const at::Tensor& state) { at::Generator(generator(index)).set_state(state); });
}

}  // namespace
