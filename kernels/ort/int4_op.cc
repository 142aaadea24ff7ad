#include "int4_op.h"

#include <cstdio>
#include <cstdlib>

#include "diablo/int4.h"
#include "tensor.h"

namespace diablo {
namespace {

constexpr const char* kName = "MatMulNBitsBlockDiag";
constexpr size_t kX = 0, kCodes = 1, kScales = 2, kBlocks = 3, kZeros = 4, kInputs = 5;
// Up to here the kernel that reads the codes once is the fastest; beyond, ONNX Runtime's own product is.
[[maybe_unused]] constexpr int64_t kFewRows = 16;

const Int4Op& self(const OrtCustomOp* op) { return *static_cast<const Int4Op*>(op); }

// One node: its numbers, and ONNX Runtime's own MatMulNBits, ready to be called.
struct Node {
  const Int4Op* op;
  int64_t in_features, out_features, bits, group_size;
  bool has_zeros;
  OrtOp* stock;
};

const char* ORT_CALL name(const OrtCustomOp*) { return kName; }
OrtElementType ORT_CALL input_element(const OrtCustomOp* op, size_t index) {
  return index == kCodes || index == kZeros ? kOrtUint8 : element_of(self(op).type);
}
size_t ORT_CALL input_count(const OrtCustomOp*) { return kInputs; }
OrtCharacteristic ORT_CALL input_kind(const OrtCustomOp*, size_t index) {
  return index == kZeros ? kOrtOptional : kOrtRequired;
}

OrtStatus* refuse(const ort::Api& api, const char* why) {
  char text[480];
  std::snprintf(text, sizeof text, "%s: %s", kName, why);
  return api.create_status(kOrtInvalidArgument, text);
}

// MatMulNBits of this node's provider, with the node's own attributes.
OrtStatus* make_stock(const Node& node, const OrtKernelInfo* info, int64_t accuracy_level, OrtOp** made) {
  const ort::Api& api = node.op->api;
  const char* const names[] = {"K", "N", "bits", "block_size", "accuracy_level"};
  const int64_t values[] = {node.in_features, node.out_features, node.bits, node.group_size, accuracy_level};
  constexpr int kAttributes = 5;
  OrtOpAttr* attributes[kAttributes] = {};
  OrtStatus* status = nullptr;
  for (int i = 0; i < kAttributes && status == nullptr; ++i)
    status = api.create_attribute(names[i], &values[i], &attributes[i]);
  if (status == nullptr) {
    const char* constraints[] = {"T1", "T2", "T3", "T4"};
    const OrtElementType types[] = {element_of(node.op->type), kOrtUint8, kOrtUint8, kOrtInt32};
    status = api.create_op(info, "MatMulNBits", "com.microsoft", 1, constraints, types, 4, attributes, kAttributes,
                           node.has_zeros ? 4 : 3, 1, made);
  }
  for (OrtOpAttr* attribute : attributes)
    if (attribute != nullptr) api.release_attribute(attribute);
  return status;
}

OrtStatus* ORT_CALL create(const OrtCustomOp* custom, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
  const Int4Op& op = self(custom);
  Node node{&op, 0, 0, 0, 0, false, nullptr};
  int64_t accuracy_level = 0;
  const struct {
    const char* name;
    int64_t* value;
  } wanted[] = {{"K", &node.in_features},          {"N", &node.out_features},           {"bits", &node.bits},
                {"block_size", &node.group_size}, {"accuracy_level", &accuracy_level}};
  for (const auto& attribute : wanted)
    if (OrtStatus* status = op.api.attribute(info, attribute.name, attribute.value)) return status;
  size_t inputs = 0;
  if (OrtStatus* status = op.api.info_input_count(info, &inputs)) return status;
  node.has_zeros = inputs > kZeros;
  // On CUDA ONNX Runtime asks for the type of the zero points' name, which such a call does not have
  if (!(op.device == Device::kCuda && node.has_zeros))
    if (OrtStatus* status = make_stock(node, info, accuracy_level, &node.stock)) return status;
  Node* kept = static_cast<Node*>(std::malloc(sizeof(Node)));
  if (kept == nullptr) return refuse(op.api, "no memory");
  *kept = node;
  *kernel = kept;
  return nullptr;
}

void ORT_CALL destroy(void* kernel) {
  Node* node = static_cast<Node*>(kernel);
  if (node->stock != nullptr) node->op->api.release_op(node->stock);
  std::free(node);
}

// The branch's shape behind this layer; nullptr, or what is wrong with it.
const char* make_shape(const Node& node, const Tensor& x, const Tensor& blocks, DiabloShape* shape) {
  if (blocks.rank != 3) return "D does not have three dimensions";
  if (x.rank == 0 || x.sizes[x.rank - 1] != node.in_features) return "the last size of X is not K";
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.rank; ++i) rows *= x.sizes[i];
  *shape = {rows,
            node.in_features,
            node.out_features,
            blocks.sizes[0],
            blocks.sizes[1],
            blocks.sizes[2],
            node.in_features,
            node.out_features,
            node.op->type,
            node.op->type};
  const DiabloError error = diablo_check(shape);
  return error == DIABLO_OK ? nullptr : diablo_error_text(error);
}

// ONNX Runtime's product into `output`.
OrtStatus* multiply_as_stock(const Node& node, const OrtKernelContext* context, OrtValue* output) {
  if (node.stock == nullptr)
    return refuse(node.op->api, "on CUDA zero points need 4 bits, float16 or bfloat16, and groups of 32 to 4096");
  const OrtValue* inputs[4] = {};
  const size_t places[4] = {kX, kCodes, kScales, kZeros};
  const int count = node.has_zeros ? 4 : 3;
  for (int i = 0; i < count; ++i)
    if (OrtStatus* status = node.op->api.input(context, places[i], &inputs[i])) return status;
  return node.op->api.invoke(context, node.stock, inputs, count, &output, 1);
}

#ifdef DIABLO_WITH_CUDA
OrtStatus* failed(const Node& node, DiabloError error, const char* cause) {
  char text[300];
  std::snprintf(text, sizeof text, "%s %s", diablo_error_text(error), cause == nullptr ? "" : cause);
  return refuse(node.op->api, text);
}

OrtStatus* compute_on_cuda(const Node& node, const OrtKernelContext* context, const DiabloShape& shape, const Tensor& x,
                           const Tensor& blocks, OrtValue* output, void* y) {
  const ort::Api& api = node.op->api;
  void* stream = nullptr;
  if (OrtStatus* status = api.gpu_stream(context, &stream)) return status;
  Tensor codes, scales, zeros{};
  if (OrtStatus* status = read(api, context, kCodes, &codes)) return status;
  if (OrtStatus* status = read(api, context, kScales, &scales)) return status;
  if (node.has_zeros)
    if (OrtStatus* status = read(api, context, kZeros, &zeros)) return status;
  const DiabloInt4 weights{node.group_size, codes.data, scales.data, static_cast<const uint8_t*>(zeros.data)};
  const char* cause = nullptr;
  if (node.bits == 4 && (shape.rows <= kFewRows || node.has_zeros) && diablo_int4_takes(&shape, &weights)) {
    const DiabloError error = diablo_int4_cuda(&shape, &weights, x.data, blocks.data, y, stream, &cause);
    return error == DIABLO_OK ? nullptr : failed(node, error, cause);
  }
  if (OrtStatus* status = multiply_as_stock(node, context, output)) return status;
  const DiabloError error = diablo_block_diag_cuda(&shape, x.data, blocks.data, nullptr, y, y, stream, &cause);
  return error == DIABLO_OK ? nullptr : failed(node, error, cause);
}
#endif

OrtStatus* compute_on_cpu(const Node& node, const OrtKernelContext* context, const DiabloShape& shape, const Tensor& x,
                          const Tensor& blocks, OrtValue* output, void* y) {
  if (OrtStatus* status = multiply_as_stock(node, context, output)) return status;
  Pool pool{node.op->api, context, nullptr};
  const DiabloParallelFor parallel{Pool::run, &pool};
  const DiabloError error = diablo_block_diag_cpu(&shape, x.data, blocks.data, nullptr, y, y, &parallel, DIABLO_AUTO);
  return error == DIABLO_OK ? pool.status : refuse(node.op->api, diablo_error_text(error));
}

OrtStatus* ORT_CALL compute(void* kernel, OrtKernelContext* context) {
  const Node& node = *static_cast<const Node*>(kernel);
  const ort::Api& api = node.op->api;
  Tensor x, blocks;
  if (OrtStatus* status = read(api, context, kX, &x)) return status;
  if (OrtStatus* status = read(api, context, kBlocks, &blocks)) return status;
  DiabloShape shape;
  if (const char* why = make_shape(node, x, blocks, &shape)) {
    char text[380];
    std::snprintf(text, sizeof text, "%s. X has shape %s, D %s, K is %lld, N %lld", why, Shown(x).text,
                  Shown(blocks).text, static_cast<long long>(node.in_features),
                  static_cast<long long>(node.out_features));
    return refuse(api, text);
  }
  int64_t sizes[kMostRank];
  for (size_t i = 0; i + 1 < x.rank; ++i) sizes[i] = x.sizes[i];
  sizes[x.rank - 1] = node.out_features;
  OrtValue* output = nullptr;
  void* y = nullptr;
  if (OrtStatus* status = api.output(context, 0, sizes, x.rank, &output)) return status;
  if (OrtStatus* status = api.data(output, &y)) return status;
  if (shape.rows == 0 || shape.out_features == 0) return nullptr;
#ifdef DIABLO_WITH_CUDA
  if (node.op->device == Device::kCuda) return compute_on_cuda(node, context, shape, x, blocks, output, y);
#endif
  return compute_on_cpu(node, context, shape, x, blocks, output, y);
}

}  // namespace

Int4Op::Int4Op(DiabloType element_type, Device runs_on, ort::Api table) : Op(element_type, runs_on, table) {
  GetName = diablo::name;
  GetInputType = input_element;
  GetInputTypeCount = input_count;
  GetInputCharacteristic = input_kind;
  CreateKernelV2 = create;
  KernelComputeV2 = diablo::compute;
  KernelDestroy = destroy;
}

}  // namespace diablo
