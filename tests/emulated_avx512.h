/* The AVX-512 and AMX intrinsics of kernel.c on a CPU without them: by SIMDe, and those that it lacks by loops as
   Intel's guide to the intrinsics describes them. Compile with -mavx2 -mfma -mf16c. */

#include <immintrin.h>
#include <string.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

/* Sixteen numbers of 32 bits of as many narrower ones, or the low bits of each. */
#define EMULATED_CONVERT(NAME, FROM, IN, TO, OUT)                   \
  static inline TO emulated_##NAME(FROM in) {                       \
    IN numbers[16];                                                 \
    OUT converted[16];                                              \
    TO out;                                                         \
    memcpy(numbers, &in, sizeof numbers);                           \
    for (int k = 0; k < 16; k++) converted[k] = (OUT)numbers[k];    \
    memcpy(&out, converted, sizeof out);                            \
    return out;                                                     \
  }
EMULATED_CONVERT(cvtepi8_epi32, __m128i, int8_t, simde__m512i, int32_t)
EMULATED_CONVERT(cvtepu8_epi32, __m128i, uint8_t, simde__m512i, int32_t)
EMULATED_CONVERT(cvtepi32_epi16, simde__m512i, int32_t, __m256i, int16_t)
EMULATED_CONVERT(cvtepi32_epi8, simde__m512i, int32_t, __m128i, int8_t)

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

static inline simde__m512i emulated_mask_expand_epi8(simde__m512i other, uint64_t mask, simde__m512i in) {
  uint8_t from[64], to[64];
  simde__m512i out;
  memcpy(from, &in, sizeof from);
  memcpy(to, &other, sizeof to);
  for (int k = 0, next = 0; k < 64; k++)
    if (mask >> k & 1) to[k] = from[next++];
  memcpy(&out, to, sizeof out);
  return out;
}

static inline int32_t emulated_reduce_add_epi32(simde__m512i in) {
  int32_t numbers[16], sum = 0;
  memcpy(numbers, &in, sizeof numbers);
  for (int k = 0; k < 16; k++) sum += numbers[k];
  return sum;
}

static inline float emulated_reduce_max_ps(simde__m512 in) {
  float numbers[16], most;
  memcpy(numbers, &in, sizeof numbers);
  most = numbers[0];
  for (int k = 1; k < 16; k++) most = numbers[k] > most ? numbers[k] : most;
  return most;
}

#define EMULATED_LOAD(NAME, VECTOR, NUMBER)                                              \
  static inline VECTOR emulated_maskz_loadu_##NAME(uint16_t mask, const void *from) {    \
    NUMBER to[16];                                                                       \
    VECTOR out;                                                                          \
    for (int k = 0; k < 16; k++) {                                                       \
      to[k] = 0;                                                                         \
      if (mask >> k & 1) memcpy(to + k, (const char *)from + k * sizeof(NUMBER), sizeof(NUMBER)); \
    }                                                                                    \
    memcpy(&out, to, sizeof out);                                                        \
    return out;                                                                          \
  }
EMULATED_LOAD(ps, simde__m512, float)
EMULATED_LOAD(epi16, __m256i, uint16_t)
EMULATED_LOAD(epi8, __m128i, uint8_t)

#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps
#define _mm256_maskz_loadu_epi16 emulated_maskz_loadu_epi16
#define _mm_maskz_loadu_epi8 emulated_maskz_loadu_epi8
#define _mm512_reduce_add_epi32 emulated_reduce_add_epi32
#define _mm512_reduce_max_ps emulated_reduce_max_ps
#define _mm512_mask_expand_epi8 emulated_mask_expand_epi8
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_maskz_expand_ps emulated_maskz_expand_ps
#define _mm512_maskz_expand_epi16 emulated_maskz_expand_epi16
#define _mm512_maskz_expand_epi8 emulated_maskz_expand_epi8

/* Tiles of 16 rows of 64 bytes, the only ones that kernel_amx.h has; a program that did not ask for them is ended. */
static _Thread_local struct {
  uint8_t configured, bytes[8][16][64];
} emulated_tiles;

static inline void emulated_tile_loadconfig(const void *config) {
  const uint8_t *of = config;
  emulated_tiles.configured = of[0] == 1;
  for (int tile = 0; tile < 8; tile++)
    if (of[16 + 2 * tile] != 64 || of[17 + 2 * tile] != 0 || of[48 + tile] != 16) emulated_tiles.configured = 0;
}
static inline void emulated_tile_release(void) { memset(&emulated_tiles, 0, sizeof emulated_tiles); }
static inline void emulated_tile_zero(int tile) { memset(emulated_tiles.bytes[tile], 0, 1024); }
static inline void emulated_tile_loadd(int tile, const void *from, long stride) {
  if (!emulated_tiles.configured) __builtin_trap();
  for (int row = 0; row < 16; row++) memcpy(emulated_tiles.bytes[tile][row], (const char *)from + row * stride, 64);
}
static inline void emulated_tile_stored(int tile, void *to, long stride) {
  for (int row = 0; row < 16; row++) memcpy((char *)to + row * stride, emulated_tiles.bytes[tile][row], 64);
}
static inline float emulated_bf16(const uint8_t *at) {
  const uint32_t bits = (uint32_t)(at[0] | at[1] << 8) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
static inline void emulated_tile_dpbf16ps(int sums, int rows, int pairs) {
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 16; column++) {
      float sum;
      memcpy(&sum, emulated_tiles.bytes[sums][row] + 4 * column, sizeof sum);
      for (int k = 0; k < 32; k++)
        sum += emulated_bf16(emulated_tiles.bytes[rows][row] + 2 * k) *
               emulated_bf16(emulated_tiles.bytes[pairs][k / 2] + 4 * column + 2 * (k % 2));
      memcpy(emulated_tiles.bytes[sums][row] + 4 * column, &sum, sizeof sum);
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_tile_loadconfig
#define _tile_release emulated_tile_release
#define _tile_zero emulated_tile_zero
#define _tile_loadd emulated_tile_loadd
#define _tile_stored emulated_tile_stored
#define _tile_dpbf16ps emulated_tile_dpbf16ps
