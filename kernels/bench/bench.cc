// Times the CPU kernels on layers of real models, and says how far they are from what the memory allows.
//
// usage: bench [warm|cold] [isa] [only lines that contain this]
//
// Cold: every call finds its blocks in main memory, as in a model whose other weights have passed through the caches
// meanwhile. "read" is a plain read of the same bytes in the same state, "copy" a memcpy of 64 MiB. Time is the calling
// thread's own, so that what else runs on the machine counts less; the fastest of many calls.
#include <ctime>

#include "../tests/fixture.h"

namespace {

struct Layer {
  const char* name;
  int64_t k, n;
};

constexpr Layer kLayers[] = {
    {"llama-3-8b q", 4096, 4096},     {"llama-3-8b k", 4096, 1024},   {"llama-3-8b gate", 4096, 14336},
    {"llama-3-8b down", 14336, 4096}, {"qwen2.5-0.5b q", 896, 896},   {"qwen2.5-0.5b k", 896, 128},
    {"qwen2.5-0.5b gate", 896, 4864}, {"qwen2.5-0.5b down", 4864, 896},
};
constexpr size_t kBeyondCaches = size_t{96} << 20;

double now() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

// The fastest call(i) of as many as fit in 0.2 s, at least 5, each on the next of `copies` inputs.
template <class Call>
double fastest(size_t copies, Call call) {
  double best = 1e9, spent = 0;
  for (size_t i = 0; i < 5 || spent < 0.2; ++i) {
    const double start = now();
    call(i % copies);
    const double taken = now() - start;
    if (i > 0) best = std::min(best, taken);
    spent += taken;
  }
  return best;
}

// Eight sums at once, so that none waits for another: what limits it is the memory.
uint64_t read_all(const unsigned char* bytes, size_t count) {
  uint64_t sums[8] = {};
  for (size_t at = 0; at + sizeof sums <= count; at += sizeof sums) {
    uint64_t words[8];
    std::memcpy(words, bytes + at, sizeof words);
    for (int i = 0; i < 8; ++i) sums[i] += words[i];
  }
  return sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7];
}

double copy_bandwidth() {
  std::vector<unsigned char> from(size_t{64} << 20, 1), to(from.size());
  const double taken = fastest(1, [&](size_t) { std::memcpy(to.data(), from.data(), from.size()); });
  return 2.0 * static_cast<double>(from.size()) / taken * 1e-9;
}

struct Options {
  bool cold;
  DiabloIsa isa;
  const char* only;
  double copy;  // GB/s
};

void time_case(const Layer& layer, int64_t num_blocks, int64_t rows, DiabloType type, DiabloType block_type,
               const Options& options) {
  DiabloShape s{rows, layer.k, layer.n, num_blocks, (layer.k + num_blocks - 1) / num_blocks,
                (layer.n + num_blocks - 1) / num_blocks, layer.k, layer.n, type, block_type};
  char label[96];
  std::snprintf(label, sizeof label, "%-17s %-8s %-8s N %-3lld M %-4lld", layer.name, name_of(type), name_of(block_type),
                (long long)num_blocks, (long long)rows);
  if (options.only && !std::strstr(label, options.only)) return;

  std::mt19937 random(0);
  const size_t elements = static_cast<size_t>(s.num_blocks * s.block_size_in * s.block_size_out);
  const size_t block_bytes = elements * size_of(block_type);
  const size_t copies = options.cold ? kBeyondCaches / block_bytes + 1 : 1;
  Numbers one(block_type, elements), x(type, static_cast<size_t>(rows * s.in_features)),
      y(type, static_cast<size_t>(rows * s.out_features));
  one.fill(random, block_type == DIABLO_I8 ? 40.0f : 0.01f), x.fill(random, 1), y.fill(random, 1);
  std::vector<unsigned char> blocks;
  for (size_t i = 0; i < copies; ++i) blocks.insert(blocks.end(), one.bytes.begin(), one.bytes.end());
  const std::vector<float> scales(static_cast<size_t>(num_blocks), 1e-4f);

  volatile uint64_t sink = 0;
  const double read = fastest(copies, [&](size_t i) { sink = sink + read_all(&blocks[i * block_bytes], block_bytes); });
  const double taken = fastest(copies, [&](size_t i) {
    SUCCEEDS(diablo_block_diag_cpu(&s, x.data(), &blocks[i * block_bytes], scales.data(), y.data(), y.data(), nullptr,
                                   options.isa));
  });
  const double moved = static_cast<double>(block_bytes + x.bytes.size() + 2 * y.bytes.size());
  const double products = 2.0 * static_cast<double>(rows) * static_cast<double>(elements);
  std::printf("%s %10.1f us %10.0f kB %7.2f GB/s %4.0f %% of copy %6.0f %% of read %7.1f GFLOP/s\n", label, taken * 1e6,
              moved * 1e-3, moved / taken * 1e-9, moved / taken * 1e-7 / options.copy, read / taken * 100,
              products / taken * 1e-9);
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  Options options{count < 2 || std::strcmp(arguments[1], "warm") != 0, DIABLO_AUTO, count > 3 ? arguments[3] : nullptr, 0};
  for (DiabloIsa isa : isas())
    if (count > 2 && std::strcmp(arguments[2], name_of(isa)) == 0) options.isa = isa;
  options.copy = copy_bandwidth();
  std::printf("memcpy of 64 MiB: %.1f GB/s; blocks %s; best instruction set of:", options.copy,
              options.cold ? "in main memory" : "in cache where they fit");
  for (DiabloIsa isa : isas()) std::printf(" %s", name_of(isa));
  std::printf("\n");
  for (const Layer& layer : kLayers)
    for (int64_t num_blocks : {4, 16, 64, 128})
      for (int64_t rows : {1, 16, 256}) {
        time_case(layer, num_blocks, rows, DIABLO_F32, DIABLO_F32, options);
        time_case(layer, num_blocks, rows, DIABLO_F16, DIABLO_F16, options);
        time_case(layer, num_blocks, rows, DIABLO_F32, DIABLO_I8, options);
      }
}
