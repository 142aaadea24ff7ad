// The one function that the library exports.
#include "block_diag_op.h"

#ifdef _WIN32
#define DIABLO_EXPORT extern "C" __declspec(dllexport)
#else
#define DIABLO_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

using diablo::BlockDiagOp;

// Sessions keep pointers to the operators and do not own the domain: all live as long as the library. One domain holds
// every kernel, as ONNX Runtime refuses a domain that comes twice, even from two libraries.
struct Domain {
  BlockDiagOp ops[3];
  OrtCustomOpDomain* handle = nullptr;
  OrtStatus* status = nullptr;

  explicit Domain(ort::Api api)
      : ops{{DIABLO_F32, api}, {DIABLO_F16, api}, {DIABLO_BF16, api}} {
    status = api.create_domain("ai.diablo", &handle);
    for (const BlockDiagOp& op : ops)
      if (status == nullptr) status = api.add_op(handle, &op);
  }
};

}  // namespace

DIABLO_EXPORT OrtStatus* ORT_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  // Before 1.18 there is no such table. Nothing is registered then, and models run the operator as their own function.
  const OrtApi* table = base->GetApi(ort::kVersion);
  if (table == nullptr) return nullptr;
  const ort::Api api{table};
  static const Domain domain(api);  // the table is the same at every call
  if (domain.status != nullptr) return api.create_status(kOrtFail, "BlockDiagMatMul: its domain could not be created");
  return api.add_domain(options, domain.handle);
}
