// The function that ONNX Runtime calls when it loads the library.
#include <atomic>
#include <new>

#include "block_diag_op.h"
#include "diablo/int4.h"
#include "export.h"
#include "int4_op.h"

namespace {

using diablo::BlockDiagOp;
using diablo::Device;

constexpr struct {
  DiabloType type, blocks;
} kPairs[] = {{DIABLO_F32, DIABLO_F32},   {DIABLO_F32, DIABLO_F16}, {DIABLO_F32, DIABLO_I8},
              {DIABLO_F16, DIABLO_F16},   {DIABLO_F16, DIABLO_I8},  {DIABLO_BF16, DIABLO_BF16},
              {DIABLO_BF16, DIABLO_F16}, {DIABLO_BF16, DIABLO_I8}};

// MatMulNBitsBlockDiag is there for what ONNX Runtime's own MatMulNBits is: on the CPU not for bfloat16.
constexpr struct {
  DiabloType type;
  Device device;
} kInt4[] = {
    {DIABLO_F32, Device::kCpu},   {DIABLO_F16, Device::kCpu},
#ifdef DIABLO_WITH_CUDA
    {DIABLO_F32, Device::kCuda},  {DIABLO_F16, Device::kCuda}, {DIABLO_BF16, Device::kCuda},
#endif
};

constexpr Device kDevices[] = {
    Device::kCpu,
#ifdef DIABLO_WITH_CUDA
    Device::kCuda,
#endif
};

// Sessions keep pointers to the operators and do not own the domain: all live as long as the library. One domain holds
// every kernel, as ONNX Runtime refuses a domain that comes twice, even from two libraries.
struct Domain {
  alignas(BlockDiagOp) unsigned char ops[sizeof kPairs / sizeof *kPairs * sizeof kDevices / sizeof *kDevices *
                                         sizeof(BlockDiagOp)];
  alignas(diablo::Int4Op) unsigned char int4[sizeof kInt4 / sizeof *kInt4 * DIABLO_INT4_LAYERS * sizeof(diablo::Int4Op)];
  OrtCustomOpDomain* handle = nullptr;
  OrtStatus* status = nullptr;

  explicit Domain(ort::Api api) {
    BlockDiagOp* next = reinterpret_cast<BlockDiagOp*>(ops);
    status = api.create_domain("ai.diablo", &handle);
    for (const Device device : kDevices)
      for (const auto& pair : kPairs) {
        if (status != nullptr) return;
        status = api.add_op(handle, new (next++) BlockDiagOp(pair.type, pair.blocks, device, api));
      }
    diablo::Int4Op* next_int4 = reinterpret_cast<diablo::Int4Op*>(int4);
    for (int layers = 1; layers <= DIABLO_INT4_LAYERS; ++layers)
      for (const auto& kind : kInt4) {
        if (status != nullptr) return;
        status = api.add_op(handle, new (next_int4++) diablo::Int4Op(kind.type, kind.device, layers, api));
      }
  }
};

// "1.24.0" → 24, which is the version of the table too. Asking GetApi for one that is not there prints a complaint.
int minor_version(const char* text) {
  int minor = 0;
  while (*text != '\0' && *text != '.') ++text;
  if (*text == '.')
    for (++text; *text >= '0' && *text <= '9'; ++text) minor = 10 * minor + (*text - '0');
  return minor;
}

// Made at the first call. A `static Domain` in the function would be the one thing here that needs libstdc++ at run
// time: linked statically that is 100 kB and a younger glibc, dynamically a library that small devices lack.
const Domain& domain(ort::Api api) {
  alignas(Domain) static unsigned char place[sizeof(Domain)];
  static std::atomic<int> state{0};  // 1: a thread makes it; 2: made
  static const Domain* made = nullptr;
  int untouched = 0;
  if (state.compare_exchange_strong(untouched, 1)) {
    made = new (place) Domain(api);  // the table is the same at every call
    state.store(2, std::memory_order_release);
  }
  while (state.load(std::memory_order_acquire) != 2) {
  }
  return *made;
}

}  // namespace

DIABLO_EXPORT OrtStatus* ORT_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  // Before 1.18 there is no such table. Nothing is registered then, and models run the operator as their own function.
  const OrtApi* table = base->GetApi(ort::kVersion);
  if (table == nullptr) return nullptr;
  const ort::Api api{table, minor_version(base->GetVersionString()) >= ort::kShapeReferenceVersion};
  const Domain& made = domain(api);
  if (made.status != nullptr) return api.create_status(kOrtFail, "BlockDiagMatMul: its domain could not be created");
  return api.add_domain(options, made.handle);
}
