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

#define EMULATED_EXPAND(NAME, VECTOR, NUMBER, MASK)                                    \
  static inline VECTOR emulated_maskz_expand_##NAME(MASK mask, VECTOR in) {            \
    enum { LANES = 64 / sizeof(NUMBER) };                                              \
    NUMBER from[LANES], to[LANES];                                                     \
    VECTOR out;                                                                        \
    memcpy(from, &in, sizeof from);                                                    \
    for (int k = 0, next = 0; k < LANES; k++) to[k] = mask >> k & 1 ? from[next++] : 0; \
    memcpy(&out, to, sizeof out);                                                      \
    return out;                                                                        \
  }
EMULATED_EXPAND(ps, simde__m512, float, uint16_t)
EMULATED_EXPAND(epi16, simde__m512i, uint16_t, uint32_t)
EMULATED_EXPAND(epi8, simde__m512i, uint8_t, uint64_t)

#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_maskz_expand_ps emulated_maskz_expand_ps
#define _mm512_maskz_expand_epi16 emulated_maskz_expand_epi16
#define _mm512_maskz_expand_epi8 emulated_maskz_expand_epi8
