// What is in this library and what it runs with on this processor: one line of JSON, for whoever has loaded it.
#include "diablo/block_diag.h"
#include "export.h"

#ifdef DIABLO_WITH_CUDA
#define DIABLO_HAS_CUDA "true"
#else
#define DIABLO_HAS_CUDA "false"
#endif
#define DIABLO_LINE(isa) "{\"version\": \"" DIABLO_VERSION "\", \"isa\": \"" isa "\", \"cuda\": " DIABLO_HAS_CUDA "}"

DIABLO_EXPORT const char* DiabloDescribe(void) {
  if (diablo_has(DIABLO_AVX512)) return DIABLO_LINE("avx512");
  if (diablo_has(DIABLO_AVX2)) return DIABLO_LINE("avx2");
  if (diablo_has(DIABLO_NEON)) return DIABLO_LINE("neon");
  return DIABLO_LINE("portable");
}
