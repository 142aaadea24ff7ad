#include "block_diag_op.h"

#include <cstdio>

#include "tensor.h"

namespace diablo {
namespace {

constexpr size_t kX = 0, kBlocks = 1, kScales = 2;  // then Y0, which comes last

const BlockDiagOp& self(const OrtCustomOp* op) { return *static_cast<const BlockDiagOp*>(op); }

size_t y0_index(const BlockDiagOp& op) { return op.scaled() ? 3 : 2; }

const char* ORT_CALL name(const OrtCustomOp* op) { return self(op).name(); }

OrtElementType ORT_CALL input_element(const OrtCustomOp* op, size_t index) {
  if (index == kBlocks) return element_of(self(op).block_type);
  return index == kScales && self(op).scaled() ? kOrtFloat : element_of(self(op).type);
}

size_t ORT_CALL input_count(const OrtCustomOp* op) { return y0_index(self(op)) + 1; }

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
  if (OrtStatus* status = api.inferred_input(context, y0_index(self(op)), &info)) return status;
  return api.infer_output(context, 0, info);
}

template <int From>
size_t ORT_CALL in_place(int** input, int** output) {
  static int from = From, to = 0;
  *input = &from;
  *output = &to;
  return 1;
}

void ORT_CALL release_in_place(int*, int*) {}

struct Inputs {
  Tensor x, blocks, scales, y0;
};

OrtStatus* read_all(const BlockDiagOp& op, const OrtKernelContext* context, Inputs* inputs) {
  if (OrtStatus* status = read(op.api, context, kX, &inputs->x)) return status;
  if (OrtStatus* status = read(op.api, context, kBlocks, &inputs->blocks)) return status;
  if (op.scaled())
    if (OrtStatus* status = read(op.api, context, kScales, &inputs->scales)) return status;
  return read(op.api, context, y0_index(op), &inputs->y0);
}

OrtStatus* refuse(const BlockDiagOp& op, const Inputs& given, const char* why) {
  char text[1280], scales[200] = "";
  if (op.scaled()) std::snprintf(scales, sizeof scales, "S %s, ", Shown(given.scales).text);
  std::snprintf(text, sizeof text,
                "%s: %s. X has shape %s, D %s, %sY0 %s; X is (..., K), Y0 (..., N) with the same leading "
                "sizes, D (num_blocks, block_size_in, block_size_out) with num_blocks * block_size_in >= K and "
                "num_blocks * block_size_out >= N, or empty%s",
                op.name(), why, Shown(given.x).text, Shown(given.blocks).text, scales, Shown(given.y0).text,
                op.scaled() ? "; S (num_blocks)" : "");
  return op.api.create_status(kOrtInvalidArgument, text);
}

// The shape as the kernels want it; nullptr, or what is wrong with it.
const char* make_shape(const BlockDiagOp& op, const Inputs& given, DiabloShape* shape) {
  const Tensor &x = given.x, &blocks = given.blocks, &y0 = given.y0;
  if (blocks.rank != 3) return "D does not have three dimensions";
  if (x.rank == 0 || x.rank != y0.rank) return "X and Y0 do not have the same number of dimensions, at least one";
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.rank; ++i) {
    if (x.sizes[i] != y0.sizes[i]) return "the leading sizes of X and Y0 differ";
    rows *= x.sizes[i];
  }
  const int64_t k = x.sizes[x.rank - 1], n = y0.sizes[y0.rank - 1];
  *shape = {rows, k, n, blocks.sizes[0], blocks.sizes[1], blocks.sizes[2], k, n, op.type, op.block_type};
  const bool empty = blocks.sizes[0] == 0 || blocks.sizes[1] == 0 || blocks.sizes[2] == 0;
  if (op.scaled() && !empty && (given.scales.rank != 1 || given.scales.sizes[0] != blocks.sizes[0]))
    return "S does not have one scale for each block";
  const DiabloError error = diablo_check(shape);
  return error == DIABLO_OK ? nullptr : diablo_error_text(error);
}

OrtStatus* multiply_on_cpu(const BlockDiagOp& op, const OrtKernelContext* context, const DiabloShape& shape,
                           const Inputs& given, void* y) {
  Pool pool{op.api, context, nullptr};
  const DiabloParallelFor parallel{Pool::run, &pool};
  const float* scales = op.scaled() ? static_cast<const float*>(given.scales.data) : nullptr;
  const DiabloError error = diablo_block_diag_cpu(&shape, given.x.data, given.blocks.data, scales, given.y0.data, y,
                                                  &parallel, DIABLO_AUTO);
  if (error != DIABLO_OK) return refuse(op, given, diablo_error_text(error));
  return pool.status;
}

#ifdef DIABLO_WITH_CUDA
OrtStatus* multiply_on_cuda(const BlockDiagOp& op, const OrtKernelContext* context, const DiabloShape& shape,
                            const Inputs& given, void* y) {
  void* stream = nullptr;
  if (OrtStatus* status = op.api.gpu_stream(context, &stream)) return status;
  const float* scales = op.scaled() ? static_cast<const float*>(given.scales.data) : nullptr;
  const char* cause = nullptr;
  const DiabloError error =
      diablo_block_diag_cuda(&shape, given.x.data, given.blocks.data, scales, given.y0.data, y, stream, &cause);
  if (error == DIABLO_OK) return nullptr;
  if (error != DIABLO_CUDA_FAILED) return refuse(op, given, diablo_error_text(error));
  char text[256];
  std::snprintf(text, sizeof text, "%s: %s: %s", op.name(), diablo_error_text(error), cause);
  return op.api.create_status(kOrtFail, text);
}
#endif

}  // namespace

BlockDiagOp::BlockDiagOp(DiabloType element_type, DiabloType element_of_blocks, Device runs_on, ort::Api table)
    : Op(element_type, runs_on, table), block_type(element_of_blocks) {
  GetName = diablo::name;
  GetInputType = input_element;
  GetInputTypeCount = input_count;
  CreateKernelV2 = create;
  KernelComputeV2 = diablo::compute;
  KernelDestroy = destroy;
  InferOutputShape = infer;
  GetMayInplace = scaled() ? in_place<3> : in_place<2>;
  ReleaseMayInplace = release_in_place;
}

OrtStatus* BlockDiagOp::compute(OrtKernelContext* context) const {
  Inputs given;
  if (OrtStatus* status = read_all(*this, context, &given)) return status;
  DiabloShape shape;
  if (const char* why = make_shape(*this, given, &shape)) return refuse(*this, given, why);

  OrtValue* output = nullptr;
  void* y = nullptr;
  if (OrtStatus* status = api.output(context, 0, given.y0.sizes, given.y0.rank, &output)) return status;
  if (OrtStatus* status = api.data(output, &y)) return status;
#ifdef DIABLO_WITH_CUDA
  if (device == Device::kCuda) return multiply_on_cuda(*this, context, shape, given, y);
#endif
  return multiply_on_cpu(*this, context, shape, given, y);
}

}  // namespace diablo
