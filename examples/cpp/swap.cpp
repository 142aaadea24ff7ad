// Run a branch export with and without its adapters in one session, through ONNX Runtime's plain C interface.
//
//   g++ -std=c++17 -O2 examples/cpp/swap.cpp -ldl -o swap
//   ./swap FOLDER LIBONNXRUNTIME "5 6 7" STEPS [--kernels LIBRARY] [ADAPTER …]
//
// FOLDER is what `diablo-export export` wrote for a decoder, in fp32 (weights may be int4); LIBONNXRUNTIME the shared
// library of ONNX Runtime 1.20 or later, such as the one inside its Python package; ADAPTER a name in FOLDER/adapters.
// For Linux and macOS. Each line of the output is "base" or an adapter, and the STEPS tokens that follow the prompt.
// With ONNX Runtime's headers at hand add -I and their folder; without them ort_subset.h declares what is called here.

#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#else
#include "ort_subset.h"
#endif

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

const OrtApi* api;

void check(OrtStatus* status) {
  if (status == nullptr) return;
  std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(message);
}

// Everything of the runtime is released by the function that its table has for it.
template <class T>
using Owned = std::unique_ptr<T, void (*)(T*)>;
template <class T>
Owned<T> own(T* pointer, void (*release)(T*)) {
  return Owned<T>(pointer, release);
}
using Value = Owned<OrtValue>;

void load_runtime(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
  if (base == nullptr) throw std::runtime_error(std::string(path) + " is not ONNX Runtime");
  api = base()->GetApi(ORT_API_VERSION);
  if (api == nullptr) throw std::runtime_error(std::string("too old: ONNX Runtime ") + base()->GetVersionString());
}

struct Model {
  OrtSession* session;
  OrtAllocator* allocator;
  OrtMemoryInfo* memory;
  std::vector<std::string> inputs, outputs;
  std::map<std::string, std::vector<int64_t>> shapes;  // of the inputs; -1 where any size may stand

  std::string take(char* name) const {
    std::string copy = name;
    check(api->AllocatorFree(allocator, name));
    return copy;
  }

  void read_names() {
    size_t count = 0;
    check(api->SessionGetInputCount(session, &count));  // overridable initializers, the blocks, are not among them
    for (size_t i = 0; i < count; ++i) {
      char* name = nullptr;
      check(api->SessionGetInputName(session, i, allocator, &name));
      inputs.push_back(take(name));
      OrtTypeInfo* type = nullptr;
      check(api->SessionGetInputTypeInfo(session, i, &type));
      auto owned = own(type, api->ReleaseTypeInfo);
      const OrtTensorTypeAndShapeInfo* info = nullptr;
      check(api->CastTypeInfoToTensorInfo(type, &info));
      size_t rank = 0;
      check(api->GetDimensionsCount(info, &rank));
      std::vector<int64_t> shape(rank);
      check(api->GetDimensions(info, shape.data(), rank));
      shapes[inputs.back()] = shape;
    }
    check(api->SessionGetOutputCount(session, &count));
    for (size_t i = 0; i < count; ++i) {
      char* name = nullptr;
      check(api->SessionGetOutputName(session, i, allocator, &name));
      outputs.push_back(take(name));
    }
  }

  template <class T>
  Value tensor(std::vector<T>& data, const std::vector<int64_t>& shape, ONNXTensorElementDataType type) const {
    OrtValue* value = nullptr;
    check(api->CreateTensorWithDataAsOrtValue(memory, data.data(), data.size() * sizeof(T), shape.data(), shape.size(),
                                              type, &value));
    return own(value, api->ReleaseValue);
  }

  Value integers(std::vector<int64_t>& data) const {
    return tensor(data, {1, int64_t(data.size())}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
  }
};

// The token with the largest logit of the last position; logits are (1, tokens, vocabulary).
int64_t largest(OrtValue* logits) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api->GetTensorTypeAndShape(logits, &info));
  auto owned = own(info, api->ReleaseTensorTypeAndShapeInfo);
  int64_t shape[3];
  check(api->GetDimensions(info, shape, 3));
  void* data = nullptr;
  check(api->GetTensorMutableData(logits, &data));
  const float* row = static_cast<const float*>(data) + (shape[1] - 1) * shape[2];
  return std::max_element(row, row + shape[2]) - row;
}

// What follows the first dot: past_key_values.0.key and past.0.conv are given back as present.0.key and present.0.conv.
std::string place(const std::string& name) { return name.substr(std::min(name.find('.'), name.size())); }

// Greedy decoding with the cache: keys and values, which grow, and states of convolutions and linear attention.
std::vector<int64_t> generate(const Model& model, const OrtRunOptions* options, std::vector<int64_t> ids, int steps) {
  std::vector<int64_t> tokens;
  std::map<std::string, Value> cache;
  std::map<std::string, std::vector<float>> zeros;
  std::map<std::string, std::string> taken;  // place → the input that takes it
  for (auto [name, shape] : model.shapes) {
    if (name.rfind("past", 0) != 0) continue;
    shape[0] = 1;  // one sequence, and no token yet where the size is open
    size_t count = 1;
    for (int64_t& size : shape) count *= size_t(size = std::max<int64_t>(size, 0));
    std::vector<float>& values = zeros[name];
    values.reserve(1);  // data() is a pointer then, though it may hold no value
    values.resize(count);
    cache.emplace(name, model.tensor(values, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
    taken[place(name)] = name;
  }
  // some models have three positions: time, height and width
  const auto wanted_positions = model.shapes.find("position_ids");
  const bool several = wanted_positions != model.shapes.end() && wanted_positions->second.size() == 3;
  const int64_t planes = several ? wanted_positions->second[0] : 1;
  for (int64_t past = 0; int(tokens.size()) < steps;) {
    std::vector<int64_t> mask(past + ids.size(), 1), positions(planes * ids.size());
    for (size_t i = 0; i < positions.size(); ++i) positions[i] = past + int64_t(i % ids.size());
    std::vector<int64_t> at = {1, int64_t(ids.size())};
    if (several) at.insert(at.begin(), planes);
    std::map<std::string, Value> fed;
    fed.emplace("input_ids", model.integers(ids));
    fed.emplace("attention_mask", model.integers(mask));
    fed.emplace("position_ids", model.tensor(positions, at, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64));
    std::vector<const char*> names, wanted;
    std::vector<const OrtValue*> values;
    for (const std::string& name : model.inputs) {
      const auto& source = cache.count(name) ? cache : fed;
      const auto found = source.find(name);
      if (found == source.end()) throw std::runtime_error("the model wants " + name + "; this example feeds decoders");
      names.push_back(name.c_str());
      values.push_back(found->second.get());
    }
    for (const std::string& name : model.outputs) wanted.push_back(name.c_str());
    std::vector<OrtValue*> results(wanted.size(), nullptr);
    check(api->Run(model.session, options, names.data(), values.data(), names.size(), wanted.data(), wanted.size(),
                   results.data()));
    past += int64_t(ids.size());
    for (size_t i = 0; i < results.size(); ++i) {
      Value result = own(results[i], api->ReleaseValue);
      const std::string& name = model.outputs[i];
      if (name == "logits") tokens.push_back(largest(result.get()));
      if (name.rfind("present", 0) == 0) cache.insert_or_assign(taken.at(place(name)), std::move(result));
    }
    ids = {tokens.back()};
  }
  return tokens;
}

void print(const std::string& name, const std::vector<int64_t>& tokens) {
  std::cout << name;
  for (int64_t token : tokens) std::cout << ' ' << token;
  std::cout << std::endl;
}

int run(const std::vector<std::string>& given) {
  const std::string folder = given[0];
  std::vector<std::string> adapters(given.begin() + 4, given.end());
  load_runtime(given[1].c_str());

  OrtEnv* env = nullptr;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "swap", &env));
  auto owned_env = own(env, api->ReleaseEnv);
  OrtSessionOptions* options = nullptr;
  check(api->CreateSessionOptions(&options));
  auto owned_options = own(options, api->ReleaseSessionOptions);
  if (adapters.size() > 1 && adapters[0] == "--kernels") {
    check(api->RegisterCustomOpsLibrary_V2(options, adapters[1].c_str()));
    adapters.erase(adapters.begin(), adapters.begin() + 2);
  }
  Model model{};
  check(api->CreateSession(env, (folder + "/model.onnx").c_str(), options, &model.session));
  auto owned_session = own(model.session, api->ReleaseSession);
  check(api->GetAllocatorWithDefaultOptions(&model.allocator));
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &model.memory));
  auto owned_memory = own(model.memory, api->ReleaseMemoryInfo);
  model.read_names();

  std::istringstream prompt(given[2]);
  std::vector<int64_t> ids;
  for (int64_t id; prompt >> id;) ids.push_back(id);
  const int steps = std::stoi(given[3]);

  print("base", generate(model, nullptr, ids, steps));
  for (const std::string& name : adapters) {
    OrtLoraAdapter* adapter = nullptr;
    check(api->CreateLoraAdapter((folder + "/adapters/" + name + ".onnx_adapter").c_str(), nullptr, &adapter));
    auto owned_adapter = own(adapter, api->ReleaseLoraAdapter);
    OrtRunOptions* active = nullptr;
    check(api->CreateRunOptions(&active));
    auto owned_active = own(active, api->ReleaseRunOptions);
    check(api->RunOptionsAddActiveLoraAdapter(active, adapter));
    print(name, generate(model, active, ids, steps));
  }
  return EXIT_SUCCESS;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 5) {
    std::cerr << "usage: swap FOLDER LIBONNXRUNTIME \"5 6 7\" STEPS [--kernels LIBRARY] [ADAPTER ...]\n";
    return 2;
  }
  try {
    return run({arguments + 1, arguments + count});
  } catch (const std::exception& error) {
    std::cerr << "swap: " << error.what() << '\n';
    return EXIT_FAILURE;
  }
}
