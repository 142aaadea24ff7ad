// What operators read of ONNX Runtime's tensors, and its threads. In an unnamed namespace, as each operator's file has
// helpers of these names.
#pragma once

#include <cstdio>

#include "diablo/block_diag.h"
#include "ort_abi.h"

namespace diablo {
namespace {

constexpr size_t kMostRank = 16;

struct Tensor {
  void* data;
  size_t rank;
  const int64_t* sizes;
  int64_t copied[kMostRank];  // only where ONNX Runtime does not show its own
};

inline OrtStatus* copy_shape(const ort::Api& api, const OrtTensorTypeAndShapeInfo* info, Tensor* tensor) {
  tensor->sizes = tensor->copied;
  if (OrtStatus* status = api.rank(info, &tensor->rank)) return status;
  if (tensor->rank <= kMostRank) return api.sizes(info, tensor->copied, tensor->rank);
  char text[128];
  std::snprintf(text, sizeof text, "ai.diablo: an input has %zu dimensions; at most %zu are supported",
                tensor->rank, kMostRank);
  return api.create_status(kOrtInvalidArgument, text);
}

inline OrtStatus* read(const ort::Api& api, const OrtKernelContext* context, size_t index, Tensor* tensor) {
  const OrtValue* value = nullptr;
  if (OrtStatus* status = api.input(context, index, &value)) return status;
  if (OrtStatus* status = api.data(const_cast<OrtValue*>(value), &tensor->data)) return status;
  OrtElementType element;
  if (api.has_shape_reference) return api.shape_reference(value, &element, &tensor->sizes, &tensor->rank);
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* status = api.info(value, &info)) return status;
  OrtStatus* status = copy_shape(api, info, tensor);
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

}  // namespace
}  // namespace diablo
