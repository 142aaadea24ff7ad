#include "block_diag_op.h"

#include <climits>
#include <cstdio>

namespace diablo {
namespace {

constexpr size_t kX = 0, kBlocks = 1, kY0 = 2, kInputs = 3;
constexpr size_t kMostRank = 16;

const BlockDiagOp& self(const OrtCustomOp* op) { return *static_cast<const BlockDiagOp*>(op); }

const char* ORT_CALL name(const OrtCustomOp*) { return "BlockDiagMatMul"; }

const char* ORT_CALL provider(const OrtCustomOp*) { return "CPUExecutionProvider"; }

OrtElementType ORT_CALL element(const OrtCustomOp* op, size_t) {
  switch (self(op).type) {
    case DIABLO_F16:
      return kOrtFloat16;
    case DIABLO_BF16:
      return kOrtBFloat16;
    default:
      return kOrtFloat;
  }
}

size_t ORT_CALL input_count(const OrtCustomOp*) { return kInputs; }
size_t ORT_CALL output_count(const OrtCustomOp*) { return 1; }
OrtCharacteristic ORT_CALL required(const OrtCustomOp*, size_t) { return kOrtRequired; }
OrtMemType ORT_CALL in_main_memory(const OrtCustomOp*, size_t) { return kOrtMemDefault; }
int ORT_CALL one(const OrtCustomOp*) { return 1; }
int ORT_CALL any_later(const OrtCustomOp*) { return INT_MAX; }

OrtStatus* ORT_CALL create(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo*, void** kernel) {
  *kernel = const_cast<OrtCustomOp*>(op);
  return nullptr;
}

void ORT_CALL destroy(void*) {}

OrtStatus* ORT_CALL compute(void* kernel, OrtKernelContext* context) {
  return static_cast<const BlockDiagOp*>(kernel)->compute(context);
}

// Y is shaped as Y0, symbols included. Without this ONNX Runtime does not know that they fit, and copies Y0.
OrtStatus* ORT_CALL infer(const OrtCustomOp* op, OrtShapeInferContext* context) {
  const ort::Api& api = self(op).api;
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context owns it
  if (OrtStatus* status = api.inferred_input(context, kY0, &info)) return status;
  return api.infer_output(context, 0, info);
}

size_t ORT_CALL in_place(int** input, int** output) {
  static int from = kY0, to = 0;
  *input = &from;
  *output = &to;
  return 1;
}

void ORT_CALL release_in_place(int*, int*) {}

struct Tensor {
  void* data;
  size_t rank;
  int64_t sizes[kMostRank];
};

OrtStatus* read_shape(const ort::Api& api, const OrtTensorTypeAndShapeInfo* info, const char* input, Tensor* tensor) {
  if (OrtStatus* status = api.rank(info, &tensor->rank)) return status;
  if (tensor->rank <= kMostRank) return api.sizes(info, tensor->sizes, tensor->rank);
  char text[128];
  std::snprintf(text, sizeof text, "BlockDiagMatMul: %s has %zu dimensions; at most %zu are supported", input,
                tensor->rank, kMostRank);
  return api.create_status(kOrtInvalidArgument, text);
}

OrtStatus* read(const ort::Api& api, const OrtKernelContext* context, size_t index, Tensor* tensor) {
  static const char* const names[] = {"X", "D", "Y0"};
  const OrtValue* value = nullptr;
  if (OrtStatus* status = api.input(context, index, &value)) return status;
  if (OrtStatus* status = api.data(const_cast<OrtValue*>(value), &tensor->data)) return status;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* status = api.info(value, &info)) return status;
  OrtStatus* status = read_shape(api, info, names[index], tensor);
  api.release_info(info);
  return status;
}

// "(2, 3, 64)", cut short where it does not fit.
struct Shown {
  char text[160];

  explicit Shown(const Tensor& tensor) {
    size_t at = static_cast<size_t>(std::snprintf(text, sizeof text, "("));
    for (size_t i = 0; i < tensor.rank && at + 24 < sizeof text; ++i)
      at += static_cast<size_t>(std::snprintf(text + at, sizeof text - at, i == 0 ? "%lld" : ", %lld",
                                              static_cast<long long>(tensor.sizes[i])));
    std::snprintf(text + at, sizeof text - at, ")");
  }
};

OrtStatus* refuse(const ort::Api& api, const Tensor& x, const Tensor& blocks, const Tensor& y0, const char* why) {
  char text[1024];
  std::snprintf(text, sizeof text,
                "BlockDiagMatMul: %s. X has shape %s, D %s, Y0 %s; X is (..., K), Y0 (..., N) with the same leading "
                "sizes, D (num_blocks, block_size_in, block_size_out) with num_blocks * block_size_in >= K and "
                "num_blocks * block_size_out >= N, or empty",
                why, Shown(x).text, Shown(blocks).text, Shown(y0).text);
  return api.create_status(kOrtInvalidArgument, text);
}

// The shape as the kernels want it; nullptr, or what is wrong with it.
const char* make_shape(const Tensor& x, const Tensor& blocks, const Tensor& y0, DiabloType type, DiabloShape* shape) {
  if (blocks.rank != 3) return "D does not have three dimensions";
  if (x.rank == 0 || x.rank != y0.rank) return "X and Y0 do not have the same number of dimensions, at least one";
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.rank; ++i) {
    if (x.sizes[i] != y0.sizes[i]) return "the leading sizes of X and Y0 differ";
    rows *= x.sizes[i];
  }
  const int64_t k = x.sizes[x.rank - 1], n = y0.sizes[y0.rank - 1];
  *shape = {rows, k, n, blocks.sizes[0], blocks.sizes[1], blocks.sizes[2], k, n, type, type};
  const DiabloError error = diablo_check(shape);
  return error == DIABLO_OK ? nullptr : diablo_error_text(error);
}

// ONNX Runtime's own threads, so that the kernel competes with no pool of another size.
struct Pool {
  const ort::Api& api;
  const OrtKernelContext* context;
  OrtStatus* status;

  static void run(void* data, void (*task)(void*, size_t), void* task_data, size_t count) {
    Pool& pool = *static_cast<Pool*>(data);
    pool.status = pool.api.parallel_for(pool.context, task, count, 0, task_data);
  }
};

OrtStatus* multiply(const ort::Api& api, const OrtKernelContext* context, const DiabloShape& shape, const Tensor& x,
                      const Tensor& blocks, const Tensor& y0, void* y) {
  Pool pool{api, context, nullptr};
  const DiabloParallelFor parallel{Pool::run, &pool};
  const DiabloError error =
      diablo_block_diag_cpu(&shape, x.data, blocks.data, nullptr, y0.data, y, &parallel, DIABLO_AUTO);
  if (error != DIABLO_OK) return refuse(api, x, blocks, y0, diablo_error_text(error));
  return pool.status;
}

}  // namespace

BlockDiagOp::BlockDiagOp(DiabloType element_type, ort::Api table) : OrtCustomOp{}, type(element_type), api(table) {
  version = ort::kVersion;
  GetName = name;
  GetExecutionProviderType = provider;
  GetInputType = GetOutputType = element;
  GetInputTypeCount = input_count;
  GetOutputTypeCount = output_count;
  GetInputCharacteristic = GetOutputCharacteristic = required;
  GetInputMemoryType = in_main_memory;
  GetVariadicInputMinArity = GetVariadicInputHomogeneity = one;
  GetVariadicOutputMinArity = GetVariadicOutputHomogeneity = one;
  CreateKernelV2 = create;
  KernelComputeV2 = diablo::compute;
  KernelDestroy = destroy;
  InferOutputShape = infer;
  GetStartVersion = one;
  GetEndVersion = any_later;
  GetMayInplace = in_place;
  ReleaseMayInplace = release_in_place;
}

OrtStatus* BlockDiagOp::compute(OrtKernelContext* context) const {
  Tensor x, blocks, y0;
  if (OrtStatus* status = read(api, context, kX, &x)) return status;
  if (OrtStatus* status = read(api, context, kBlocks, &blocks)) return status;
  if (OrtStatus* status = read(api, context, kY0, &y0)) return status;
  DiabloShape shape;
  if (const char* why = make_shape(x, blocks, y0, type, &shape)) return refuse(api, x, blocks, y0, why);

  OrtValue* output = nullptr;
  void* y = nullptr;
  if (OrtStatus* status = api.output(context, 0, y0.sizes, y0.rank, &output)) return status;
  if (OrtStatus* status = api.data(output, &y)) return status;
  return multiply(api, context, shape, x, blocks, y0, y);
}

}  // namespace diablo
