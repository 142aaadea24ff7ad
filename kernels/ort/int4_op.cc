#include "int4_op.h"

#include <cstdio>
#include <cstdlib>

#include "diablo/int4.h"
#include "tensor.h"

namespace diablo {
namespace {

constexpr int kMostLayers = DIABLO_INT4_LAYERS;
constexpr const char* kNames[] = {"MatMulNBitsBlockDiag", "MatMulNBitsBlockDiagPair", "MatMulNBitsBlockDiagTriple"};
// Inputs: X, then codes, scales and blocks of each layer, and at last zero points of all layers, or none
constexpr size_t kX = 0, kCodes = 1, kScales = 2, kBlocks = 3, kEach = 3;
constexpr const char* kOutputs[] = {"N", "N2", "N3"};
// Up to here the kernel that reads the codes once is the fastest; beyond, ONNX Runtime's product of dense matrices is.
[[maybe_unused]] constexpr int64_t kFewRows = 16;

const Int4Op& self(const OrtCustomOp* op) { return *static_cast<const Int4Op*>(op); }
size_t input_of(size_t kind, int layer) { return kind + kEach * static_cast<size_t>(layer); }
size_t zeros_of(int layers, int layer) { return input_of(1, layers) + static_cast<size_t>(layer); }

// One node: its numbers, and operators of ONNX Runtime's own, ready to be called.
struct Node {
  const Int4Op* op;
  int64_t in_features, out_features[kMostLayers], bits, group_size;
  bool has_zeros;
  OrtOp* stock[kMostLayers];  // MatMulNBits of each layer; or
  OrtOp* dense;               // FusedMatMul of dense matrices, the second transposed, where a kernel makes those of codes
};

const char* ORT_CALL name(const OrtCustomOp* op) { return kNames[self(op).layers - 1]; }
OrtElementType ORT_CALL input_element(const OrtCustomOp* op, size_t index) {
  const bool codes = index % kEach == kCodes, zeros = index >= zeros_of(self(op).layers, 0);
  return codes || zeros ? kOrtUint8 : element_of(self(op).type);
}
size_t ORT_CALL input_count(const OrtCustomOp* op) { return zeros_of(self(op).layers, self(op).layers); }
OrtCharacteristic ORT_CALL input_kind(const OrtCustomOp* op, size_t index) {
  return index >= zeros_of(self(op).layers, 0) ? kOrtOptional : kOrtRequired;
}
size_t ORT_CALL output_count(const OrtCustomOp* op) { return static_cast<size_t>(self(op).layers); }

OrtStatus* refuse(const Int4Op& op, const char* why) {
  char text[480];
  std::snprintf(text, sizeof text, "%s: %s", name(&op), why);
  return op.api.create_status(kOrtInvalidArgument, text);
}

struct Attribute {
  const char* name;
  int64_t value;
};

// An operator of com.microsoft of this node's provider, with integers for attributes.
template <size_t Attributes, size_t Types>
OrtStatus* make_op(const ort::Api& api, const OrtKernelInfo* info, const char* of, const Attribute (&given)[Attributes],
                   const char* const (&constraints)[Types], const OrtElementType (&types)[Types], int inputs, OrtOp** made) {
  OrtOpAttr* attributes[Attributes] = {};
  OrtStatus* status = nullptr;
  for (size_t i = 0; i < Attributes && status == nullptr; ++i)
    status = api.create_attribute(given[i].name, &given[i].value, &attributes[i]);
  if (status == nullptr)
    status = api.create_op(info, of, "com.microsoft", 1, const_cast<const char**>(constraints), types, Types, attributes,
                           Attributes, inputs, 1, made);
  for (OrtOpAttr* attribute : attributes)
    if (attribute != nullptr) api.release_attribute(attribute);
  return status;
}

OrtStatus* make_stock(const Node& node, const OrtKernelInfo* info, int layer, int64_t accuracy_level, OrtOp** made) {
  const OrtElementType types[] = {element_of(node.op->type), kOrtUint8, kOrtUint8, kOrtInt32};
  return make_op(node.op->api, info, "MatMulNBits",
                 {{"K", node.in_features},
                  {"N", node.out_features[layer]},
                  {"bits", node.bits},
                  {"block_size", node.group_size},
                  {"accuracy_level", accuracy_level}},
                 {"T1", "T2", "T3", "T4"}, types, node.has_zeros ? 4 : 3, made);
}

OrtStatus* make_dense(const Node& node, const OrtKernelInfo* info, OrtOp** made) {
  const OrtElementType types[] = {element_of(node.op->type)};
  return make_op(node.op->api, info, "FusedMatMul", {{"transA", 0}, {"transB", 1}}, {"T"}, types, 2, made);
}

// Whether the kernels of this library multiply such a node's layers.
bool has_kernels(const Node& node) {
#ifdef DIABLO_WITH_CUDA
  DiabloInt4Layer layer{};
  layer.shape.type = layer.shape.block_type = node.op->type;
  layer.weights.group_size = node.group_size;
  return node.op->device == Device::kCuda && node.bits == 4 && diablo_int4_takes(&layer, 1);
#else
  return static_cast<void>(node), false;
#endif
}

OrtStatus* make_operators(Node* node, const OrtKernelInfo* info, int64_t accuracy_level) {
  if (has_kernels(*node)) return make_dense(*node, info, &node->dense);
  // On CUDA ONNX Runtime asks for the type of the zero points' name, which such a call does not have
  if (node->op->device == Device::kCuda && node->has_zeros)
    return refuse(*node->op, "on CUDA zero points need 4 bits, float16 or bfloat16, and groups of 32 to 4096");
  for (int i = 0; i < node->op->layers; ++i)
    if (OrtStatus* status = make_stock(*node, info, i, accuracy_level, &node->stock[i])) return status;
  return nullptr;
}

void ORT_CALL destroy(void* kernel) {
  Node* node = static_cast<Node*>(kernel);
  for (OrtOp* op : node->stock)
    if (op != nullptr) node->op->api.release_op(op);
  if (node->dense != nullptr) node->op->api.release_op(node->dense);
  std::free(node);
}

OrtStatus* ORT_CALL create(const OrtCustomOp* custom, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
  const Int4Op& op = self(custom);
  Node* node = static_cast<Node*>(std::calloc(1, sizeof(Node)));
  if (node == nullptr) return refuse(op, "no memory");
  node->op = &op;
  int64_t accuracy_level = 0;
  OrtStatus* status = op.api.attribute(info, "K", &node->in_features);
  for (int i = 0; i < op.layers && status == nullptr; ++i)
    status = op.api.attribute(info, kOutputs[i], &node->out_features[i]);
  if (status == nullptr) status = op.api.attribute(info, "bits", &node->bits);
  if (status == nullptr) status = op.api.attribute(info, "block_size", &node->group_size);
  if (status == nullptr) status = op.api.attribute(info, "accuracy_level", &accuracy_level);
  size_t inputs = 0;
  if (status == nullptr) status = op.api.info_input_count(info, &inputs);
  node->has_zeros = inputs > zeros_of(op.layers, 0);
  if (status == nullptr) status = make_operators(node, info, accuracy_level);
  *kernel = node;
  if (status != nullptr) destroy(node);
  return status;
}

// One layer of a call.
struct Layer {
  DiabloShape shape;
  Tensor blocks;
  OrtValue* output;
  void* y;
};

// The branch's shape behind this layer; nullptr, or what is wrong with it.
const char* make_shape(const Node& node, int layer, const Tensor& x, const Tensor& blocks, DiabloShape* shape) {
  if (blocks.rank != 3) return "D does not have three dimensions";
  if (x.rank == 0 || x.sizes[x.rank - 1] != node.in_features) return "the last size of X is not K";
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.rank; ++i) rows *= x.sizes[i];
  const int64_t inputs = node.in_features, outputs = node.out_features[layer];
  *shape = {rows,   inputs,  outputs,       blocks.sizes[0], blocks.sizes[1], blocks.sizes[2],
            inputs, outputs, node.op->type, node.op->type};
  const DiabloError error = diablo_check(shape);
  return error == DIABLO_OK ? nullptr : diablo_error_text(error);
}

// A layer's blocks, sizes and output, which ONNX Runtime makes here.
OrtStatus* open_layer(const Node& node, OrtKernelContext* context, int index, const Tensor& x, Layer* layer) {
  const ort::Api& api = node.op->api;
  if (OrtStatus* status = read(api, context, input_of(kBlocks, index), &layer->blocks)) return status;
  if (const char* why = make_shape(node, index, x, layer->blocks, &layer->shape)) {
    char text[380];
    std::snprintf(text, sizeof text, "%s. X has shape %s, D %s, K is %lld, %s %lld", why, Shown(x).text,
                  Shown(layer->blocks).text, static_cast<long long>(node.in_features), kOutputs[index],
                  static_cast<long long>(node.out_features[index]));
    return refuse(*node.op, text);
  }
  int64_t sizes[kMostRank];
  for (size_t i = 0; i + 1 < x.rank; ++i) sizes[i] = x.sizes[i];
  sizes[x.rank - 1] = node.out_features[index];
  if (OrtStatus* status = api.output(context, static_cast<size_t>(index), sizes, x.rank, &layer->output)) return status;
  return api.data(layer->output, &layer->y);
}

// ONNX Runtime's product of a layer into its output.
OrtStatus* multiply_as_stock(const Node& node, const OrtKernelContext* context, int layer, OrtValue* output) {
  const OrtValue* inputs[4] = {};
  const size_t places[4] = {kX, input_of(kCodes, layer), input_of(kScales, layer), zeros_of(node.op->layers, layer)};
  const int count = node.has_zeros ? 4 : 3;
  for (int i = 0; i < count; ++i)
    if (OrtStatus* status = node.op->api.input(context, places[i], &inputs[i])) return status;
  return node.op->api.invoke(context, node.stock[layer], inputs, count, &output, 1);
}

#ifdef DIABLO_WITH_CUDA
OrtStatus* failed(const Node& node, DiabloError error, const char* cause) {
  char text[300];
  std::snprintf(text, sizeof text, "%s %s", diablo_error_text(error), cause == nullptr ? "" : cause);
  return refuse(*node.op, text);
}

// The weight and its blocks into `memory`, and x times that into the output.
OrtStatus* multiply_dense_in(const Node& node, const OrtKernelContext* context, const DiabloInt4Layer& layer,
                             const OrtMemoryInfo* place, void* memory, size_t bytes, OrtValue* output, void* stream) {
  const ort::Api& api = node.op->api;
  const char* cause = nullptr;
  const DiabloError error = diablo_int4_dense_cuda(&layer, memory, stream, &cause);
  if (error != DIABLO_OK) return failed(node, error, cause);
  const int64_t sizes[] = {layer.shape.out_features, layer.shape.in_features};
  const OrtValue* inputs[2] = {};
  OrtValue* dense = nullptr;
  if (OrtStatus* status = api.input(context, kX, &inputs[0])) return status;
  if (OrtStatus* status = api.tensor_in(place, memory, bytes, sizes, 2, element_of(node.op->type), &dense)) return status;
  inputs[1] = dense;
  OrtStatus* status = api.invoke(context, node.dense, inputs, 2, &output, 1);
  api.release_value(dense);
  return status;
}

OrtStatus* multiply_dense(const Node& node, const OrtKernelContext* context, const DiabloInt4Layer& layer, OrtValue* output,
                          void* stream) {
  const ort::Api& api = node.op->api;
  const size_t outputs = static_cast<size_t>(layer.shape.out_features), inputs = static_cast<size_t>(layer.shape.in_features);
  const size_t bytes = outputs * inputs * (layer.shape.type == DIABLO_F32 ? 4 : 2);
  const OrtMemoryInfo* place = nullptr;
  void* memory = nullptr;
  if (bytes == 0) return nullptr;
  if (OrtStatus* status = api.memory_info(output, &place)) return status;
  if (OrtStatus* status = api.borrow(context, place, bytes, &memory)) return status;
  OrtStatus* status = multiply_dense_in(node, context, layer, place, memory, bytes, output, stream);
  OrtStatus* after = api.give_back(context, place, memory);
  if (status == nullptr) return after;
  if (after != nullptr) api.release_status(after);
  return status;
}

OrtStatus* compute_on_cuda(const Node& node, const OrtKernelContext* context, const Tensor& x, const Layer* layers) {
  const ort::Api& api = node.op->api;
  const int count = node.op->layers;
  void* stream = nullptr;
  if (OrtStatus* status = api.gpu_stream(context, &stream)) return status;
  DiabloInt4Layer given[kMostLayers];
  for (int i = 0; i < count; ++i) {
    Tensor codes, scales, zeros{};
    if (OrtStatus* status = read(api, context, input_of(kCodes, i), &codes)) return status;
    if (OrtStatus* status = read(api, context, input_of(kScales, i), &scales)) return status;
    if (node.has_zeros)
      if (OrtStatus* status = read(api, context, zeros_of(count, i), &zeros)) return status;
    given[i] = {layers[i].shape,
                {node.group_size, codes.data, scales.data, static_cast<const uint8_t*>(zeros.data)},
                layers[i].blocks.data,
                layers[i].y};
  }
  const char* cause = nullptr;
  if (node.dense != nullptr && given[0].shape.rows <= kFewRows) {
    const DiabloError error = diablo_int4_cuda(given, count, x.data, stream, &cause);
    return error == DIABLO_OK ? nullptr : failed(node, error, cause);
  }
  for (int i = 0; i < count; ++i) {
    if (node.dense != nullptr) {
      if (OrtStatus* status = multiply_dense(node, context, given[i], layers[i].output, stream)) return status;
      continue;
    }
    if (OrtStatus* status = multiply_as_stock(node, context, i, layers[i].output)) return status;
    const DiabloError error = diablo_block_diag_cuda(&given[i].shape, x.data, given[i].blocks, nullptr, given[i].y,
                                                     given[i].y, stream, &cause);
    if (error != DIABLO_OK) return failed(node, error, cause);
  }
  return nullptr;
}
#endif

OrtStatus* compute_on_cpu(const Node& node, const OrtKernelContext* context, const Tensor& x, const Layer* layers) {
  for (int i = 0; i < node.op->layers; ++i) {
    const Layer& layer = layers[i];
    if (OrtStatus* status = multiply_as_stock(node, context, i, layer.output)) return status;
    Pool pool{node.op->api, context, nullptr};
    const DiabloParallelFor parallel{Pool::run, &pool};
    const DiabloError error = diablo_block_diag_cpu(&layer.shape, x.data, layer.blocks.data, nullptr, layer.y, layer.y,
                                                    &parallel, DIABLO_AUTO);
    if (error != DIABLO_OK) return refuse(*node.op, diablo_error_text(error));
    if (pool.status != nullptr) return pool.status;
  }
  return nullptr;
}

OrtStatus* ORT_CALL compute(void* kernel, OrtKernelContext* context) {
  const Node& node = *static_cast<const Node*>(kernel);
  Tensor x;
  if (OrtStatus* status = read(node.op->api, context, kX, &x)) return status;
  Layer layers[kMostLayers];
  for (int i = 0; i < node.op->layers; ++i)
    if (OrtStatus* status = open_layer(node, context, i, x, &layers[i])) return status;
  if (layers[0].shape.rows == 0) return nullptr;
#ifdef DIABLO_WITH_CUDA
  if (node.op->device == Device::kCuda) return compute_on_cuda(node, context, x, layers);
#endif
  return compute_on_cpu(node, context, x, layers);
}

}  // namespace

Int4Op::Int4Op(DiabloType element_type, Device runs_on, int count, ort::Api table)
    : Op(element_type, runs_on, table), layers(count) {
  GetName = diablo::name;
  GetInputType = input_element;
  GetInputTypeCount = input_count;
  GetInputCharacteristic = input_kind;
  GetOutputTypeCount = output_count;
  CreateKernelV2 = create;
  KernelComputeV2 = diablo::compute;
  KernelDestroy = destroy;
}

}  // namespace diablo
