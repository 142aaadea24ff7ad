// The CUDA half of ort/int4_op.cc on the CPU: its operators, registered there for float32, over plain loops in place of the
// kernels. What it asks of ONNX Runtime, its memory, its operators, the order of inputs, is tried where there is no GPU;
// tests/test_onnx_join.py of the project does.
#include <cstdio>
#include <cstdlib>
#include <new>

#include "../ort/block_diag_op.h"
#include "../ort/export.h"
#include "../ort/int4_op.h"
#include "diablo/int4.h"

namespace {

// Tells whoever asks, by this environment variable, which way a call went.
void say(const char* way, int layers) {
  if (std::getenv("DIABLO_STAND_IN_SAYS") != nullptr) std::fprintf(stderr, "%s %d\n", way, layers);
}

float weight(const DiabloInt4Layer& layer, int64_t n, int64_t k) {
  const DiabloShape& s = layer.shape;
  const DiabloInt4& w = layer.weights;
  const int64_t groups = (s.in_features + w.group_size - 1) / w.group_size, group = k / w.group_size;
  const int code = static_cast<const uint8_t*>(w.codes)[(n * groups * w.group_size + k) / 2] >> (k % 2 * 4) & 15;
  const int zero = w.zeros == nullptr ? 8 : w.zeros[n * ((groups + 1) / 2) + group / 2] >> (group % 2 * 4) & 15;
  float value = static_cast<float>(code - zero) * static_cast<const float*>(w.scales)[n * groups + group];
  if (s.num_blocks * s.block_size_in * s.block_size_out != 0 && k / s.block_size_in == n / s.block_size_out)
    value += static_cast<const float*>(layer.blocks)[k * s.block_size_out + n % s.block_size_out];
  return value;
}

}  // namespace

int diablo_int4_takes(const DiabloInt4Layer*, int) { return 1; }

DiabloError diablo_int4_cuda(const DiabloInt4Layer* layers, int count, const void* x, void*, const char**) {
  say("rows", count);
  for (const DiabloInt4Layer* layer = layers; layer != layers + count; ++layer)
    for (int64_t r = 0; r < layer->shape.rows; ++r)
      for (int64_t n = 0; n < layer->shape.out_features; ++n) {
        float sum = 0;
        for (int64_t k = 0; k < layer->shape.in_features; ++k)
          sum += static_cast<const float*>(x)[r * layer->shape.x_stride + k] * weight(*layer, n, k);
        static_cast<float*>(layer->y)[r * layer->shape.y_stride + n] = sum;
      }
  return DIABLO_OK;
}

DiabloError diablo_int4_dense_cuda(const DiabloInt4Layer* layer, void* dense, void*, const char**) {
  say("dense", 1);
  for (int64_t n = 0; n < layer->shape.out_features; ++n)
    for (int64_t k = 0; k < layer->shape.in_features; ++k)
      static_cast<float*>(dense)[n * layer->shape.in_features + k] = weight(*layer, n, k);
  return DIABLO_OK;
}

DiabloError diablo_block_diag_cuda(const DiabloShape* shape, const void* x, const void* blocks, const float* scales,
                                   const void* y0, void* y, void*, const char**) {
  return diablo_block_diag_cpu(shape, x, blocks, scales, y0, y, nullptr, DIABLO_AUTO);
}

DIABLO_EXPORT const char* DiabloDescribe(void) { return "{\"version\": \"stand-in\", \"isa\": \"portable\", \"cuda\": true}"; }

DIABLO_EXPORT OrtStatus* ORT_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const ort::Api api{base->GetApi(ort::kVersion), false};
  alignas(diablo::Int4Op) static unsigned char places[DIABLO_INT4_LAYERS][sizeof(diablo::Int4Op)];
  static OrtCustomOpDomain* domain = nullptr;
  if (domain == nullptr) {
    if (OrtStatus* status = api.create_domain("ai.diablo", &domain)) return status;
    for (int layers = 1; layers <= DIABLO_INT4_LAYERS; ++layers) {
      const auto* op = new (places[layers - 1]) diablo::Int4Op(DIABLO_F32, diablo::Device::kCuda, layers, api);
      if (OrtStatus* status = api.add_op(domain, op)) return status;
    }
  }
  return api.add_domain(options, domain);
}
