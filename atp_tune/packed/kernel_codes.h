/* Products with codes of 2 to 8 bits as they lie in a packed folder, by dot products of bytes; part of kernel.c.

   A weight is (q - z) s. q is the next code, or z where the mask has no bit; scale s and zero point z are those of a
   BLOCK of columns, which several blocks may share. x is rounded to 16 bits, with a scale of its own for each block of
   a token, and multiplied as two bytes, 256 h + l: in 8 bits it would cost SmolLM2 0.014 to 0.03 nats. So what a block
   adds is s times that scale, times Σ q x - z Σ x, of integers; a zero costs no instruction of its own.

   64 codes of b bits are 8 b bytes: the i-th 8 of them begin in byte i b, from where they are put into 64 bits, and out
   of these each is shifted into a byte. They begin in the middle of a byte as well as at its start, so that codes of 8
   bits alone fill the 64 bits. A row is read where it is unless a vector of it would end behind the array: the last
   rows are read in a copy with zeros after it. */

#ifdef EMULATED_AVX512
#define codes_TARGET
#else
#define codes_TARGET __attribute__((target(AVX512_FEATURES ",avx512vbmi,avx512vbmi2,avx512vnni")))
#endif
#define CODES_INLINE codes_TARGET INLINE
enum { codes_PART = 64, codes_MOST = 127 * 256 + 127 }; /* blocks whose factors are kept at once; the largest x */

/* x [tokens, C] as high and low bytes; of each block [tokens, C / BLOCK] its scale, and the sum of its x times that. */
struct rounded {
  const int8_t *high, *low;
  const float *scales, *sums;
};

typedef struct {
  __m512i places, low; /* bytes of the codes for 8 × 64 bits; the bits of a code */
  const uint8_t *shifts;
} code_form;

CODES_INLINE code_form codes_form(int32_t bits) {
  code_form form = {.low = _mm512_set1_epi8((char)(255 >> (8 - bits))), .shifts = tables.code_shifts[bits][0]};
  form.places = _mm512_loadu_si512(tables.code_bytes[bits]);
  return form;
}

/* The 64 codes from a bit on, and zero points where the mask has no bit. */
CODES_INLINE __m512i codes_expand(code_form form, const uint8_t *codes, uint64_t bit, uint64_t mask, uint8_t zero) {
  const __m512i raw = _mm512_permutexvar_epi8(form.places, _mm512_loadu_si512(codes + (bit >> 3)));
  const __m512i shifts = _mm512_load_si512((const void *)(form.shifts + 64 * (bit & 7)));
  const __m512i all = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, raw), form.low);
  return _mm512_mask_expand_epi8(_mm512_set1_epi8((char)zero), (__mmask64)mask, all);
}

INLINE uint64_t codes_start(const struct matrix *matrix, int64_t row) { /* the first bit of a row */
  const uint64_t end = 8 * (uint64_t)matrix->count;
  const uint64_t code = (uint64_t)(matrix->bitmask ? matrix->offsets[row] : row * matrix->columns);
  return code < end ? code * (uint64_t)matrix->bits < end ? code * (uint64_t)matrix->bits : end : end;
}

/* Where the codes of a row lie that begin with a bit: in the array, or in the tail. */
INLINE const uint8_t *codes_of(const struct job *job, uint64_t bit) {
  return bit >> 3 < job->tail_at ? job->matrix->values : job->tail - job->tail_at;
}

INLINE uint64_t codes_mask(const struct matrix *matrix, int64_t row, int64_t block) {
  const int64_t at = (row * (matrix->columns / BLOCK) + block) * 8;
  return matrix->bitmask ? load_mask(matrix->bitmask + at, 8) : UINT64_MAX;
}

CODES_INLINE __m512 codes_scales(const struct matrix *matrix, int64_t at, __mmask16 there) {
  const __m256i halves = _mm256_maskz_loadu_epi16(there, matrix->scales + 2 * at);
  return _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(matrix->unit));
}

#define CODED(ROWS, TOKENS)                                                                                           \
  codes_TARGET static void codes_##TOKENS(const struct job *job, int64_t first, int64_t last) {                       \
    const struct matrix *matrix = job->matrix;                                                                        \
    const struct rounded *x = (const struct rounded *)job->x;                                                         \
    const int64_t columns = matrix->columns, blocks = columns / BLOCK;                                                \
    const uint64_t bits = (uint64_t)matrix->bits;                                                                     \
    const code_form form = codes_form(matrix->bits);                                                                  \
    for (int64_t start = first; start < last; start += ROWS) {                                                        \
      __m512 sums[ROWS][TOKENS], less[ROWS][TOKENS];                                                                  \
      int64_t row[ROWS];                                                                                              \
      uint64_t bit[ROWS];                                                                                             \
      const uint8_t *codes[ROWS];                                                                                     \
      UNROLL for (int i = 0; i < ROWS; i++) {                                                                         \
        row[i] = start + i < last ? start + i : last - 1; /* the last again, so that there are ROWS */                \
        bit[i] = codes_start(matrix, row[i]);                                                                         \
        codes[i] = codes_of(job, bit[i]);                                                                             \
        UNROLL for (int t = 0; t < TOKENS; t++) sums[i][t] = less[i][t] = _mm512_setzero_ps();                        \
      }                                                                                                               \
      for (int64_t part = 0; part < blocks; part += codes_PART) {                                                     \
        const int64_t length = blocks - part < codes_PART ? blocks - part : codes_PART;                               \
        _Alignas(64) float factors[ROWS][TOKENS][codes_PART];                                                         \
        for (int i = 0; i < ROWS; i++) {                                                                              \
          for (int64_t k = 0; k < length; k += 16) {                                                                  \
            const __mmask16 there = (__mmask16)(length - k < 16 ? (1 << (length - k)) - 1 : 0xffff);                  \
            const int64_t at = row[i] * blocks + part + k;                                                            \
            const __m512 scales = codes_scales(matrix, at, there);                                                    \
            const __m512i zeros = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, matrix->zeros + at));              \
            __builtin_prefetch(matrix->scales + 2 * (at + ROWS * blocks));                                            \
            __builtin_prefetch(matrix->zeros + at + ROWS * blocks);                                                   \
            const __m512 shares = _mm512_mul_ps(scales, _mm512_cvtepi32_ps(zeros));                                   \
            for (int t = 0; t < TOKENS; t++) {                                                                        \
              const int64_t of_x = t * blocks + part + k;                                                             \
              const __m512 own = _mm512_mul_ps(scales, _mm512_maskz_loadu_ps(there, x->scales + of_x));               \
              const __m512 of_block = _mm512_maskz_loadu_ps(there, x->sums + of_x);                                   \
              _mm512_store_ps(factors[i][t] + k, own);                                                                \
              less[i][t] = _mm512_fmadd_ps(shares, of_block, less[i][t]);                                             \
            }                                                                                                         \
          }                                                                                                           \
        }                                                                                                             \
        for (int64_t k = 0; k < length; k++) {                                                                        \
          const int64_t masks = (row[0] + ROWS) * blocks + ROWS * (part + k);                                         \
          __m512i high[TOKENS], low[TOKENS];                                                                          \
          __builtin_prefetch((const void *)((uintptr_t)matrix->bitmask + 8 * (uintptr_t)masks));                      \
          UNROLL for (int t = 0; t < TOKENS; t++) {                                                                   \
            high[t] = _mm512_loadu_si512(x->high + t * columns + (part + k) * BLOCK);                                 \
            low[t] = _mm512_loadu_si512(x->low + t * columns + (part + k) * BLOCK);                                   \
          }                                                                                                           \
          UNROLL for (int i = 0; i < ROWS; i++) {                                                                     \
            const uint64_t mask = codes_mask(matrix, row[i], part + k);                                               \
            const uint8_t zero = matrix->zeros[row[i] * blocks + part + k];                                           \
            const __m512i weights = codes_expand(form, codes[i], bit[i], mask, zero);                                 \
            __builtin_prefetch((const void *)((uintptr_t)codes[i] + (bit[i] >> 3) + AHEAD));                          \
            bit[i] += bits * (uint64_t)__builtin_popcountll(mask);                                                    \
            UNROLL for (int t = 0; t < TOKENS; t++) {                                                                 \
              const __m512i highs = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, high[t]);                    \
              const __m512i sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(highs, 8), weights, low[t]);                  \
              const __m512 factor = _mm512_set1_ps(factors[i][t][k]);                                                 \
              sums[i][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, sums[i][t]);                              \
            }                                                                                                         \
          }                                                                                                           \
        }                                                                                                             \
      }                                                                                                               \
      UNROLL for (int i = 0; i < ROWS; i++) {                                                                         \
        const float bias = matrix->bias ? load_number(matrix->bias, matrix->bias_type, row[i]) : 0;                   \
        UNROLL for (int t = 0; t < TOKENS; t++) {                                                                     \
          const float total = avx512_total(_mm512_sub_ps(sums[i][t], less[i][t]));                            \
          if (t < job->tokens) store_number(total + bias, job->y, job->y_type, t * matrix->rows + row[i]);            \
        }                                                                                                             \
      }                                                                                                               \
    }                                                                                                                 \
  }
CODED(4, 1)
CODED(4, 2)
CODED(2, 4)
CODED(1, 8)

/* Rows of weights, as they are computed from the files: (q - z) times a scale, in float32. */
codes_TARGET static void codes_unpack(const struct job *job, int64_t first, int64_t last) {
  const struct matrix *matrix = job->matrix;
  const int64_t columns = matrix->columns, blocks = columns / BLOCK, size = size_of(job->y_type);
  const code_form form = codes_form(matrix->bits);
  for (int64_t row = first; row < last; row++) {
    uint64_t bit = codes_start(matrix, row);
    const uint8_t *codes = codes_of(job, bit);
    for (int64_t block = 0; block < blocks; block++) {
      _Alignas(64) float weights[BLOCK];
      _Alignas(64) uint8_t bytes[BLOCK];
      const int64_t at = row * blocks + block;
      const uint64_t mask = codes_mask(matrix, row, block);
      const float scale = load_half(matrix->scales + 2 * at) * matrix->unit;
      const __m512i zero = _mm512_set1_epi32(matrix->zeros[at]);
      _mm512_store_si512((void *)bytes, codes_expand(form, codes, bit, mask, matrix->zeros[at]));
      bit += (uint64_t)matrix->bits * (uint64_t)__builtin_popcountll(mask);
      for (int k = 0; k < BLOCK; k += 16) {
        const __m512i q = _mm512_cvtepu8_epi32(_mm_load_si128((const void *)(bytes + k)));
        const __m512 steps = _mm512_cvtepi32_ps(_mm512_sub_epi32(q, zero));
        _mm512_store_ps(weights + k, _mm512_mul_ps(steps, _mm512_set1_ps(scale)));
      }
      uint8_t *out = job->y + ((row - job->first) * columns + block * BLOCK) * size;
      uint16_t narrow[BLOCK];
      if (job->y_type == BF16)
        for (int k = 0; k < BLOCK; k++) narrow[k] = bf16_of(weights[k]);
      else if (job->y_type == HALF)
        for (int k = 0; k < BLOCK; k++) narrow[k] = half_of(weights[k]);
      memcpy(out, job->y_type == FLOAT ? (const void *)weights : narrow, (size_t)(BLOCK * size));
    }
  }
}

/* Rounds C numbers x to 16 bits, each block by its largest one; 0 if one is not finite, or so large that a sum is not. */
codes_TARGET static int codes_round(const float *x, int64_t count, int8_t *high, int8_t *low, float *scales,
                                    float *sums) {
  int finite = 1;
  for (int64_t block = 0; block < count / BLOCK; block++) {
    __m512 most = _mm512_setzero_ps(), in[4];
    __m512i whole = _mm512_setzero_si512();
    UNROLL for (int k = 0; k < 4; k++) {
      in[k] = _mm512_loadu_ps(x + block * BLOCK + 16 * k);
      most = _mm512_max_ps(_mm512_abs_ps(in[k]), most); /* NaN, if `in` is */
      finite &= _mm512_cmp_ps_mask(_mm512_abs_ps(in[k]), _mm512_set1_ps(__FLT_MAX__ / (2 * BLOCK)), _CMP_LE_OQ) == 0xffff;
    }
    const float largest = _mm512_reduce_max_ps(most), scale = largest / codes_MOST;
    const __m512 inverse = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
    UNROLL for (int k = 0; k < 4; k++) {
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(in[k], inverse)); /* the nearest, of two the even one */
      const __m512i highs = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
      const __m512i lows = _mm512_sub_epi32(q, _mm512_slli_epi32(highs, 8));
      whole = _mm512_add_epi32(whole, q);
      _mm_storeu_si128((__m128i *)(void *)(high + block * BLOCK + 16 * k), _mm512_cvtepi32_epi8(highs));
      _mm_storeu_si128((__m128i *)(void *)(low + block * BLOCK + 16 * k), _mm512_cvtepi32_epi8(lows));
    }
    scales[block] = scale;
    sums[block] = scale * (float)_mm512_reduce_add_epi32(whole);
  }
  return finite;
}

static const loop code_products[4] = {codes_1, codes_2, codes_4, codes_8};
