/* The AVX-512 intrinsics of kernel.c on a CPU without them: by SIMDe, and the four that it lacks by loops as Intel's
   guide to the intrinsics describes them. Compile with -mavx2 -mfma -mf16c. */

#include <immintrin.h>
#include <string.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

static inline simde__m512i emulated_cvtepi8_epi32(__m128i in) {
  int8_t bytes[16];
  int32_t numbers[16];
  simde__m512i out;
  memcpy(bytes, &in, sizeof bytes);
  for (int k = 0; k < 16; k++) numbers[k] = bytes[k];
  memcpy(&out, numbers, sizeof out);
  return out;
}

static inline simde__m512 emulated_maskz_expand_ps(uint16_t mask, simde__m512 in) {
  float from[16], to[16];
  simde__m512 out;
  memcpy(from, &in, sizeof from);
  for (int k = 0, next = 0; k < 16; k++) to[k] = mask >> k & 1 ? from[next++] : 0;
  memcpy(&out, to, sizeof out);
  return out;
}

static inline simde__m512i emulated_maskz_expand_epi16(uint32_t mask, simde__m512i in) {
  uint16_t from[32], to[32];
  simde__m512i out;
  memcpy(from, &in, sizeof from);
  for (int k = 0, next = 0; k < 32; k++) to[k] = mask >> k & 1 ? from[next++] : 0;
  memcpy(&out, to, sizeof out);
  return out;
}

static inline simde__m512i emulated_maskz_expand_epi8(uint64_t mask, simde__m512i in) {
  uint8_t from[64], to[64];
  simde__m512i out;
  memcpy(from, &in, sizeof from);
  for (int k = 0, next = 0; k < 64; k++) to[k] = mask >> k & 1 ? from[next++] : 0;
  memcpy(&out, to, sizeof out);
  return out;
}

#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_maskz_expand_ps emulated_maskz_expand_ps
#define _mm512_maskz_expand_epi16 emulated_maskz_expand_epi16
#define _mm512_maskz_expand_epi8 emulated_maskz_expand_epi8
