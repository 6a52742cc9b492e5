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
  const int16_t *whole; /* AVX2: both bytes */
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

/* The 64 codes from a bit of the byte at `at` on, and zero points where the mask has no bit. */
CODES_INLINE __m512i codes_all(code_form form, const uint8_t *at, uint64_t bit) {
  const __m512i raw = _mm512_permutexvar_epi8(form.places, _mm512_loadu_si512(at));
  const __m512i shifts = _mm512_load_si512((const void *)(form.shifts + 64 * (bit & 7)));
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, raw), form.low);
}

CODES_INLINE __m512i codes_expand(code_form form, const uint8_t *at, uint64_t bit, uint64_t mask, uint8_t zero) {
  return _mm512_mask_expand_epi8(_mm512_set1_epi8((char)zero), (__mmask64)mask, codes_all(form, at, bit));
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

/* Products of ROWS rows at a time with TOKENS tokens; MASKED: whether there are zeros between the codes. */
#define CODED_ROWS(ROWS, TOKENS, MASKED)                                                                               \
    for (int64_t start = first; start < last; start += ROWS) {                                                         \
      __m512 sums[ROWS][TOKENS], less[ROWS][TOKENS];                                                                   \
      int64_t row[ROWS];                                                                                               \
      uint64_t bit[ROWS];                                                                                              \
      const uint8_t *codes[ROWS];                                                                                      \
      UNROLL for (int i = 0; i < ROWS; i++) {                                                                          \
        row[i] = start + i < last ? start + i : last - 1; /* the last again, so that there are ROWS */                 \
        bit[i] = codes_start(matrix, row[i]);                                                                          \
        codes[i] = codes_of(job, bit[i]);                                                                              \
        UNROLL for (int t = 0; t < TOKENS; t++) sums[i][t] = less[i][t] = _mm512_setzero_ps();                         \
      }                                                                                                                \
      const uintptr_t ahead = (uintptr_t)((bit[ROWS - 1] - bit[0]) >> 3) + AHEAD;                                      \
      for (int64_t part = 0; part < blocks; part += codes_PART) {                                                      \
        const int64_t length = blocks - part < codes_PART ? blocks - part : codes_PART;                                \
        _Alignas(64) float factors[ROWS][TOKENS][codes_PART];                                                          \
        for (int i = 0; i < ROWS; i++) {                                                                               \
          for (int64_t k = 0; k < length; k += 16) {                                                                   \
            const __mmask16 there = (__mmask16)(length - k < 16 ? (1 << (length - k)) - 1 : 0xffff);                   \
            const int64_t at = row[i] * blocks + part + k;                                                             \
            const __m512 scales = codes_scales(matrix, at, there);                                                     \
            const __m512i zeros = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, matrix->zeros + at));               \
            __builtin_prefetch(matrix->scales + 2 * (at + ROWS * blocks));                                             \
            __builtin_prefetch(matrix->zeros + at + ROWS * blocks);                                                    \
            const __m512 shares = _mm512_mul_ps(scales, _mm512_cvtepi32_ps(zeros));                                    \
            for (int t = 0; t < TOKENS; t++) {                                                                         \
              const int64_t of_x = t * blocks + part + k;                                                              \
              const __m512 own = _mm512_mul_ps(scales, _mm512_maskz_loadu_ps(there, x->scales + of_x));                \
              const __m512 of_block = _mm512_maskz_loadu_ps(there, x->sums + of_x);                                    \
              _mm512_store_ps(factors[i][t] + k, own);                                                                 \
              less[i][t] = _mm512_fmadd_ps(shares, of_block, less[i][t]);                                              \
            }                                                                                                          \
          }                                                                                                            \
        }                                                                                                              \
        const uint8_t *masks[ROWS], *zeros[ROWS];                                                                      \
        UNROLL for (int i = 0; i < ROWS; i++) {                                                                        \
          zeros[i] = matrix->zeros + row[i] * blocks + part;                                                           \
          masks[i] = MASKED ? matrix->bitmask + 8 * (row[i] * blocks + part) : NULL;                                   \
        }                                                                                                              \
        const uintptr_t masks_ahead = (uintptr_t)masks[0] + 8 * (uintptr_t)(ROWS * blocks);                            \
        const int8_t *highs_at = x->high + part * BLOCK, *lows_at = x->low + part * BLOCK;                             \
        for (int64_t k = 0; k < length; k++) {                                                                         \
          __m512i high[TOKENS], low[TOKENS];                                                                           \
          if (MASKED) __builtin_prefetch((const void *)(masks_ahead + 8 * ROWS * (uintptr_t)k));                       \
          UNROLL for (int t = 0; t < TOKENS; t++) {                                                                    \
            high[t] = _mm512_loadu_si512(highs_at + t * columns + k * BLOCK);                                          \
            low[t] = _mm512_loadu_si512(lows_at + t * columns + k * BLOCK);                                            \
          }                                                                                                            \
          UNROLL for (int i = 0; i < ROWS; i++) {                                                                      \
            const uint64_t mask = MASKED ? load_mask(masks[i] + 8 * k, 8) : UINT64_MAX;                                \
            const uint8_t *at = codes[i] + (bit[i] >> 3);                                                              \
            const __m512i weights =                                                                                    \
                MASKED ? codes_expand(form, at, bit[i], mask, zeros[i][k]) : codes_all(form, at, bit[i]);              \
            __builtin_prefetch((const void *)((uintptr_t)at + ahead));                                                 \
            bit[i] += MASKED ? bits * (uint64_t)__builtin_popcountll(mask) : BLOCK * bits;                             \
            UNROLL for (int t = 0; t < TOKENS; t++) {                                                                  \
              const __m512i highs = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, high[t]);                     \
              const __m512i sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(highs, 8), weights, low[t]);                   \
              const __m512 factor = _mm512_set1_ps(factors[i][t][k]);                                                  \
              sums[i][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, sums[i][t]);                               \
            }                                                                                                          \
          }                                                                                                            \
        }                                                                                                              \
      }                                                                                                                \
      UNROLL for (int i = 0; i < ROWS; i++) {                                                                          \
        const float bias = matrix->bias ? load_number(matrix->bias, matrix->bias_type, row[i]) : 0;                    \
        UNROLL for (int t = 0; t < TOKENS; t++) {                                                                      \
          const float total = avx512_total(_mm512_sub_ps(sums[i][t], less[i][t]));                                     \
          if (t < job->tokens) store_number(total + bias, job->y, job->y_type, t * matrix->rows + row[i]);             \
        }                                                                                                              \
      }                                                                                                                \
    }

#define CODED(ROWS, TOKENS)                                                                                            \
  codes_TARGET static void codes_##TOKENS(const struct job *job, int64_t first, int64_t last) {                        \
    const struct matrix *matrix = job->matrix;                                                                         \
    const struct rounded *x = (const struct rounded *)job->x;                                                          \
    const int64_t columns = matrix->columns, blocks = columns / BLOCK;                                                 \
    const uint64_t bits = (uint64_t)matrix->bits;                                                                      \
    const code_form form = codes_form(matrix->bits);                                                                   \
    if (matrix->bitmask) {                                                                                             \
      CODED_ROWS(ROWS, TOKENS, 1)                                                                                      \
    } else {                                                                                                           \
      CODED_ROWS(ROWS, TOKENS, 0)                                                                                      \
    }                                                                                                                  \
  }
CODED(4, 1)
CODED(4, 2)
CODED(2, 4)
CODED(1, 8)

/* --- AVX2: a deposit of bits puts 8 codes into the bytes of a word that the mask has; x is multiplied in 16 bits */

/* `count` codes from a bit on, which goes behind them, in fields of 64 / count bits where the mask has a bit, and zero
   points elsewhere: 16 fields of 4 bits, or 8 of 8. */
avx2_TARGET INLINE uint64_t avx2_fields(int count, int32_t bits, const uint8_t *codes, uint64_t *bit, uint64_t mask,
                                        uint8_t zero) {
  const uint64_t each = count == 16 ? 0x1111111111111111 : 0x0101010101010101, of_code = each * (255 >> (8 - bits));
  const uint64_t firsts = _pdep_u64(mask, each), kept = (firsts << 64 / count) - firsts, shift = *bit & 7;
  const uint8_t *at = codes + (*bit >> 3);
  uint64_t word;
  memcpy(&word, at, sizeof word);
  word >>= shift;
  if (count == 16) word |= (uint64_t)at[8] << 1 << (63 - shift); /* 16 codes may end behind the 64 bits */
  *bit += (uint64_t)bits * (uint64_t)__builtin_popcountll(mask);
  return _pdep_u64(word, kept & of_code) | (each * zero & ~kept);
}

/* 16 codes, one in each byte. */
avx2_TARGET INLINE __m128i avx2_sixteen(int32_t bits, const uint8_t *codes, uint64_t *bit, uint64_t mask,
                                        uint8_t zero) {
  if (bits <= 4) {
    const __m128i pairs = _mm_cvtsi64_si128((int64_t)avx2_fields(16, bits, codes, bit, mask & 0xffff, zero));
    const __m128i low = _mm_set1_epi8(15), seconds = _mm_srli_epi16(pairs, 4);
    return _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(seconds, low));
  }
  const uint64_t first = avx2_fields(8, bits, codes, bit, mask & 0xff, zero);
  return _mm_set_epi64x((int64_t)avx2_fields(8, bits, codes, bit, mask >> 8 & 0xff, zero), (int64_t)first);
}

avx2_TARGET INLINE void avx2_codes_expand(int32_t bits, const uint8_t *codes, uint64_t bit, uint64_t mask, uint8_t zero,
                                          uint8_t *bytes) {
  for (int k = 0; k < BLOCK; k += 16, mask >>= 16)
    _mm_storeu_si128((__m128i *)(void *)(bytes + k), avx2_sixteen(bits, codes, &bit, mask, zero));
}

#define AVX2_CODED(TOKENS)                                                                                             \
  avx2_TARGET static void avx2_codes_##TOKENS(const struct job *job, int64_t first, int64_t last) {                    \
    const struct matrix *matrix = job->matrix;                                                                         \
    const struct rounded *x = (const struct rounded *)job->x;                                                          \
    const int64_t columns = matrix->columns, blocks = columns / BLOCK;                                                 \
    for (int64_t row = first; row < last; row++) {                                                                     \
      uint64_t bit = codes_start(matrix, row);                                                                         \
      const uint8_t *codes = codes_of(job, bit);                                                                       \
      __m256 sums[TOKENS];                                                                                             \
      float less[TOKENS];                                                                                              \
      UNROLL for (int t = 0; t < TOKENS; t++) sums[t] = _mm256_setzero_ps(), less[t] = 0;                              \
      for (int64_t block = 0; block < blocks; block++) {                                                               \
        __m256i weights[4];                                                                                            \
        const int64_t at = row * blocks + block;                                                                       \
        uint64_t mask = codes_mask(matrix, row, block);                                                                \
        const float scale = _cvtsh_ss(load16(matrix->scales + 2 * at)) * matrix->unit;                                 \
        const float share = scale * (float)matrix->zeros[at];                                                          \
        __builtin_prefetch((const void *)((uintptr_t)codes + (bit >> 3) + AHEAD));                                     \
        UNROLL for (int k = 0; k < 4; k++, mask >>= 16)                                                                \
          weights[k] = _mm256_cvtepu8_epi16(avx2_sixteen(matrix->bits, codes, &bit, mask, matrix->zeros[at]));         \
        UNROLL for (int t = 0; t < TOKENS; t++) {                                                                      \
          const int16_t *of_x = x->whole + t * columns + block * BLOCK;                                                \
          __m256i sum = _mm256_setzero_si256();                                                                        \
          UNROLL for (int k = 0; k < 4; k++) {                                                                         \
            const __m256i inputs = _mm256_loadu_si256((const void *)(of_x + 16 * k));                                  \
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(weights[k], inputs));                                        \
          }                                                                                                            \
          const __m256 factor = _mm256_set1_ps(scale * x->scales[t * blocks + block]);                                 \
          sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, sums[t]);                                         \
          less[t] += share * x->sums[t * blocks + block];                                                              \
        }                                                                                                              \
      }                                                                                                                \
      const float bias = matrix->bias ? load_number(matrix->bias, matrix->bias_type, row) : 0;                         \
      UNROLL for (int t = 0; t < TOKENS; t++) {                                                                        \
        const float total = avx2_total(sums[t]) - less[t];                                                             \
        if (t < job->tokens) store_number(total + bias, job->y, job->y_type, t * matrix->rows + row);                  \
      }                                                                                                                \
    }                                                                                                                  \
  }

AVX2_CODED(1)
AVX2_CODED(2)
AVX2_CODED(4)
AVX2_CODED(8)

/* Rows of weights, as they are computed from the files: (q - z) times a scale, in float32. */
#define UNPACK_CODES(NAME, TARGET, EXPAND)                                                                             \
  TARGET static void NAME(const struct job *job, int64_t first, int64_t last) {                                        \
    const struct matrix *matrix = job->matrix;                                                                         \
    const int64_t columns = matrix->columns, blocks = columns / BLOCK, size = size_of(job->y_type);                    \
    for (int64_t row = first; row < last; row++) {                                                                     \
      uint64_t bit = codes_start(matrix, row);                                                                         \
      const uint8_t *codes = codes_of(job, bit);                                                                       \
      for (int64_t block = 0; block < blocks; block++) {                                                               \
        _Alignas(64) float weights[BLOCK];                                                                             \
        _Alignas(64) uint8_t bytes[BLOCK];                                                                             \
        uint16_t narrow[BLOCK];                                                                                        \
        const int64_t at = row * blocks + block;                                                                       \
        const uint64_t mask = codes_mask(matrix, row, block);                                                          \
        const float scale = load_half(matrix->scales + 2 * at) * matrix->unit;                                         \
        const int32_t zero = matrix->zeros[at];                                                                        \
        EXPAND(matrix->bits, codes, bit, mask, (uint8_t)zero, bytes);                                                  \
        bit += (uint64_t)matrix->bits * (uint64_t)__builtin_popcountll(mask);                                          \
        for (int k = 0; k < BLOCK; k++) weights[k] = (float)(bytes[k] - zero) * scale;                                 \
        uint8_t *out = job->y + ((row - job->first) * columns + block * BLOCK) * size;                                 \
        if (job->y_type == BF16)                                                                                       \
          for (int k = 0; k < BLOCK; k++) narrow[k] = bf16_of(weights[k]);                                             \
        else if (job->y_type == HALF)                                                                                  \
          for (int k = 0; k < BLOCK; k++) narrow[k] = half_of(weights[k]);                                             \
        memcpy(out, job->y_type == FLOAT ? (const void *)weights : narrow, (size_t)(BLOCK * size));                    \
      }                                                                                                                \
    }                                                                                                                  \
  }

CODES_INLINE void codes_expand_to(int32_t bits, const uint8_t *codes, uint64_t bit, uint64_t mask, uint8_t zero,
                                  uint8_t *bytes) {
  _mm512_store_si512((void *)bytes, codes_expand(codes_form(bits), codes + (bit >> 3), bit, mask, zero));
}
UNPACK_CODES(codes_unpack, codes_TARGET, codes_expand_to)
UNPACK_CODES(avx2_codes_unpack, avx2_TARGET, avx2_codes_expand)

/* Rounds C numbers x to 16 bits, each block by its largest; 0 if one is not finite, or so large that a sum is not. */
codes_TARGET static int codes_round(const float *x, int64_t count, int8_t *high, int8_t *low, float *scales,
                                    float *sums) {
  int finite = 1;
  for (int64_t block = 0; block < count / BLOCK; block++) {
    __m512 most = _mm512_setzero_ps(), in[4];
    __m512i whole = _mm512_setzero_si512();
    UNROLL for (int k = 0; k < 4; k++) {
      in[k] = _mm512_loadu_ps(x + block * BLOCK + 16 * k);
      most = _mm512_max_ps(_mm512_abs_ps(in[k]), most); /* NaN, if `in` is */
      const __m512 bound = _mm512_set1_ps(__FLT_MAX__ / (2 * BLOCK));
      finite &= _mm512_cmp_ps_mask(_mm512_abs_ps(in[k]), bound, _CMP_LE_OQ) == 0xffff;
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

/* The same for AVX2. */
avx2_TARGET static int avx2_codes_round(const float *x, int64_t count, int16_t *whole, float *scales, float *sums) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  int finite = 1;
  for (int64_t block = 0; block < count / BLOCK; block++) {
    __m256 most = _mm256_setzero_ps(), in[8];
    __m256i sum = _mm256_setzero_si256();
    UNROLL for (int k = 0; k < 8; k++) {
      in[k] = _mm256_loadu_ps(x + block * BLOCK + 8 * k);
      const __m256 size = _mm256_and_ps(in[k], magnitude);
      most = _mm256_max_ps(size, most);
      finite &= _mm256_movemask_ps(_mm256_cmp_ps(size, _mm256_set1_ps(__FLT_MAX__ / (2 * BLOCK)), _CMP_LE_OQ)) == 0xff;
    }
    float largest = 0;
    for (int k = 0; k < 8; k++) largest = most[k] > largest ? most[k] : largest;
    const float scale = largest / codes_MOST;
    const __m256 inverse = _mm256_set1_ps(scale > 0 ? 1 / scale : 0);
    UNROLL for (int k = 0; k < 8; k++) {
      const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(in[k], inverse));
      const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
      _mm_storeu_si128((__m128i *)(void *)(whole + block * BLOCK + 8 * k), narrow);
      sum = _mm256_add_epi32(sum, q);
    }
    int32_t parts[8], total = 0;
    memcpy(parts, &sum, sizeof parts);
    for (int k = 0; k < 8; k++) total += parts[k];
    scales[block] = scale;
    sums[block] = scale * (float)total;
  }
  return finite;
}

/* By the variant of AVX-512, and by that of AVX2. */
static const loop code_products[2][4] = {{codes_1, codes_2, codes_4, codes_8},
                                         {avx2_codes_1, avx2_codes_2, avx2_codes_4, avx2_codes_8}};
static const loop code_unpacks[2] = {codes_unpack, avx2_codes_unpack};
