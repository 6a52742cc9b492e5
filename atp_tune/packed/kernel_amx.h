/* Products of bfloat16 by AMX, whose tiles hold 16 × 64 bytes; part of kernel.c. A zero is multiplied like another
   weight: tiles are so fast that what counts is how the weights come into them.

   A tile of weights is SIDE rows × DEPTH columns, one of x the same of SIDE tokens, in pairs of columns:
   [DEPTH / 2, SIDE, 2]; their product is added to sums [SIDE rows, SIDE tokens]. Two tiles of each go together, so that
   each is read for two products. ROWS_TOGETHER rows go through a part of the columns at a time, up to STEPS tiles: their
   weights are expanded once, stay in the second cache and are multiplied by all tokens, up to MOST, whose x of these
   columns goes through the first cache, two tiles of tokens after the other. Each sum is made in the order of the
   columns. */

#ifdef EMULATED_AVX512
#define amx_TARGET
#else
#define amx_TARGET __attribute__((target(AVX512_FEATURES ",avx512vbmi2,amx-tile,amx-bf16")))
#endif
enum { amx_SIDE = 16, amx_DEPTH = 32, amx_ROWS_TOGETHER = 128, amx_STEPS = 18, amx_AHEAD = 8 };
enum { amx_TILE = amx_SIDE * amx_DEPTH }; /* numbers of 16 bits, or pairs of them times 2 */
enum { amx_MOST = 512, amx_STRIDE = amx_MOST + 16 }; /* tokens; no power of 2, as STRIDE */

/* Asks the kernel of the system for the registers, which are 8 KB for each thread; 0 if it has none. */
static int amx_allowed(void) {
#ifdef EMULATED_AVX512
  return 1;
#elif defined(__linux__) && defined(SYS_arch_prctl)
  enum { ASK_FOR_FEATURE = 0x1023, TILE_DATA = 18 };
  return syscall(SYS_arch_prctl, ASK_FOR_FEATURE, TILE_DATA) == 0;
#else
  return 0;
#endif
}

amx_TARGET static void amx_begin(void) { /* all tiles of a thread have 16 rows of 64 bytes */
  _Alignas(64) uint8_t config[64] = {1};
  for (int tile = 0; tile < 8; tile++) config[16 + 2 * tile] = 64, config[48 + tile] = amx_SIDE;
  _tile_loadconfig(config);
}

INLINE int64_t amx_part(int64_t steps) { /* of as few parts as possible, in whole BLOCKs; the last may have fewer */
  const int64_t parts = (steps + amx_STEPS - 1) / amx_STEPS;
  return (steps + parts - 1) / parts + (steps + parts - 1) / parts % 2;
}

/* Columns `first` to `last` of x to tiles: those of a part of the columns and SIDE tokens one after the other. */
amx_TARGET static void amx_pairs(const struct job *job, int64_t first, int64_t last) {
  const int64_t columns = job->matrix->columns, steps = job->width / amx_DEPTH, part = amx_part(steps);
  const int64_t groups = (job->tokens + amx_SIDE - 1) / amx_SIDE;
  for (int64_t step = first / amx_DEPTH; step < last / amx_DEPTH; step++) {
    const int64_t start = step / part * part, in_part = steps - start < part ? steps - start : part;
    const int64_t left = columns - step * amx_DEPTH, length = left < amx_DEPTH ? left : amx_DEPTH;
    const uint8_t *x = (const uint8_t *)job->x + 2 * step * amx_DEPTH;
    for (int64_t group = 0; group < groups; group++) {
      _Alignas(64) float pairs[amx_SIDE][amx_DEPTH / 2] = {{0}};
      for (int64_t t = 0; t < amx_SIDE && group * amx_SIDE + t < job->tokens; t++) {
        const uint8_t *from = x + 2 * (group * amx_SIDE + t) * columns;
        if (length == amx_DEPTH)
          memcpy(pairs[t], from, 2 * amx_DEPTH);
        else
          memcpy(pairs[t], from, (size_t)(2 * length));
      }
      float *to = job->panels + (start * groups + group * in_part + step - start) * (amx_TILE / 2);
      UNROLL for (int t = 0; t < amx_SIDE; t += 8)
        UNROLL for (int k = 0; k < amx_DEPTH / 2; k += 8)
          avx2_transpose(pairs[t] + k, amx_DEPTH / 2, to + k * amx_SIDE + t, amx_SIDE);
    }
  }
}

/* BLOCK columns of a row with their zeros, as bfloat16: the two halves stand in two tiles. */
amx_TARGET INLINE void amx_expand_bf16(const uint8_t *from, uint64_t mask, const float *scales, uint16_t *to) {
  const uint32_t low = (uint32_t)mask, high = (uint32_t)(mask >> 32);
  (void)scales;
  _mm512_store_si512(to, _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(from)));
  from += 2 * __builtin_popcount(low);
  _mm512_store_si512(to + amx_TILE, _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(from)));
}

/* Of int8 values: `scales` of the block's groups, or NULL, as sums are multiplied by scales of rows: a whole number up to
   127 is exact in bfloat16, other numbers are rounded to it. */
amx_TARGET INLINE void amx_expand_codes(const uint8_t *from, uint64_t mask, const float *scales, uint16_t *to) {
  _Alignas(64) int8_t codes[BLOCK];
  _mm512_store_si512(codes, _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(from)));
  UNROLL for (int k = 0; k < BLOCK; k += 16) {
    __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128((const __m128i *)(codes + k))));
    if (scales != NULL) wide = avx512_times(wide, scales[k / GROUP]);
    const __m512i bits = _mm512_castps_si512(wide), half = _mm512_set1_epi32(0x7fff);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, half), odd); /* of two as near the even one */
    _mm256_store_si256((__m256i *)(to + k / amx_DEPTH * amx_TILE + k % amx_DEPTH),
                       _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
  }
}
#define amx_expand_int8 amx_expand_codes
#define amx_expand_grouped amx_expand_codes

/* The products of two tiles of weights, and one or two of x, over some steps; the sums go on from those there. */
amx_TARGET INLINE void amx_add(float *sums, const uint16_t *weights, const float *x, int64_t steps, int go_on,
                               int both) {
  enum { BYTES = 4 * amx_STRIDE };
  float *below = sums + amx_SIDE * amx_STRIDE;
  const uint16_t *more = weights + amx_STEPS * amx_TILE;
  const float *next = x + steps * (amx_TILE / 2);
  if (go_on) {
    _tile_loadd(0, sums, BYTES);
    _tile_loadd(2, below, BYTES);
    if (both) {
      _tile_loadd(1, sums + amx_SIDE, BYTES);
      _tile_loadd(3, below + amx_SIDE, BYTES);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; step++) {
    _tile_loadd(4, weights + step * amx_TILE, 64);
    _tile_loadd(6, x + step * (amx_TILE / 2), 64);
    _tile_loadd(5, more + step * amx_TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (both) {
      _tile_loadd(7, next + step * (amx_TILE / 2), 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, BYTES);
  _tile_stored(2, below, BYTES);
  if (both) {
    _tile_stored(1, sums + amx_SIDE, BYTES);
    _tile_stored(3, below + amx_SIDE, BYTES);
  }
}

/* Asks for what will be read of a row from a column on, whose values begin with number `at`; `count` of them. */
INLINE void amx_ask(const struct matrix *matrix, int64_t row, int64_t column, uint64_t at, uint64_t count) {
  const uint64_t size = matrix->type == BF16 ? 2 : 1;
  __builtin_prefetch(matrix->bitmask + row * ((matrix->columns + 7) / 8) + column / 8);
  for (uint64_t k = 0; k < count * size; k += 64)
    __builtin_prefetch((const void *)((uintptr_t)matrix->values + at * size + k));
}

#define AMX_READ(TYPE)                                                                                                \
  amx_TARGET INLINE void amx_read_##TYPE(const struct matrix *matrix, int64_t row, int64_t column, int64_t length,    \
                                         uint64_t *at, uint16_t *to) {                                                \
    const int64_t stride = (matrix->columns + 7) / 8, group_width = matrix->columns / matrix->groups;                 \
    const float *scales = (const float *)(const void *)matrix->scales + row * matrix->groups;                         \
    for (int64_t end = column + length; column < end; column += BLOCK, to += 2 * amx_TILE) {                          \
      const uint64_t mask = load_mask(matrix->bitmask + row * stride + column / 8, stride - column / 8);              \
      float of_groups[BLOCK / GROUP] = {0};                                                                           \
      uint8_t buffer[BLOCK * SIZE_##TYPE];                                                                            \
      const uint8_t *from = block_at(matrix, *at, SIZE_##TYPE, buffer);                                               \
      for (int k = 0; SCALED_##TYPE == 2 && k < BLOCK / GROUP && column + k * GROUP < matrix->columns; k++)           \
        of_groups[k] = scales[(column + k * GROUP) / group_width];                                                    \
      amx_expand_##TYPE(from, mask, SCALED_##TYPE == 2 ? of_groups : NULL, to);                                       \
      *at += (uint64_t)__builtin_popcountll(mask);                                                                    \
    }                                                                                                                 \
  }

#define AMX_MANY(TYPE)                                                                                                \
  AMX_READ(TYPE)                                                                                                      \
  amx_TARGET static void amx_many_##TYPE(const struct job *job, int64_t first, int64_t last) {                        \
    _Alignas(64) uint16_t weights[amx_ROWS_TOGETHER * amx_STEPS * amx_DEPTH];                                         \
    _Alignas(64) float sums[amx_ROWS_TOGETHER][amx_STRIDE];                                                           \
    uint64_t at[amx_ROWS_TOGETHER];                                                                                   \
    const struct matrix *matrix = job->matrix;                                                                        \
    const int64_t all = job->width / amx_DEPTH, part = amx_part(all);                                                 \
    const int64_t groups = (job->tokens + amx_SIDE - 1) / amx_SIDE;                                                   \
    amx_begin();                                                                                                      \
    for (int64_t start = first; start < last; start += amx_ROWS_TOGETHER) {                                           \
      const int64_t rows = last - start < amx_ROWS_TOGETHER ? last - start : amx_ROWS_TOGETHER;                       \
      const int64_t tiles = (rows + 2 * amx_SIDE - 1) / (2 * amx_SIDE) * 2;                                           \
      const float *x = job->panels;                                                                                   \
      for (int64_t i = 0; i < rows; i++) at[i] = (uint64_t)matrix->offsets[start + i];                                \
      for (int64_t step = 0; step < all; step += part) {                                                              \
        const int64_t steps = all - step < part ? all - step : part, column = step * amx_DEPTH;                       \
        const int64_t left = matrix->columns - column, length = left < steps * amx_DEPTH ? left : steps * amx_DEPTH;  \
        for (int64_t i = 0; i < tiles * amx_SIDE; i++) {                                                              \
          uint16_t *to = weights + i / amx_SIDE * amx_STEPS * amx_TILE + i % amx_SIDE * amx_DEPTH;                    \
          if (i < rows) {                                                                                             \
            const uint64_t began = at[i];                                                                             \
            amx_read_##TYPE(matrix, start + i, column, length, at + i, to);                                           \
            const int64_t later = i + amx_AHEAD, next = later - rows;                                                 \
            if (later < rows)                                                                                         \
              amx_ask(matrix, start + later, column, at[later], at[i] - began);                                       \
            else if (next < rows && left > length)                                                                    \
              amx_ask(matrix, start + next, column + length, at[next], at[i] - began);                                \
            else if (start + later < last)                                                                            \
              amx_ask(matrix, start + later, 0, (uint64_t)matrix->offsets[start + later], at[i] - began);             \
          } else                                                                                                      \
            for (int64_t k = 0; k < steps; k++) memset(to + k * amx_TILE, 0, 2 * amx_DEPTH);                          \
        }                                                                                                             \
        for (int64_t group = 0; group < groups; group += 2, x += 2 * steps * (amx_TILE / 2))                          \
          for (int64_t tile = 0; tile < tiles; tile += 2)                                                             \
            amx_add(sums[tile * amx_SIDE] + group * amx_SIDE, weights + tile * amx_STEPS * amx_TILE, x, steps,        \
                    step > 0, group + 1 < groups);                                                                    \
        x -= groups % 2 * steps * (amx_TILE / 2);                                                                     \
      }                                                                                                               \
      for (int64_t i = 0; i < rows; i += TOGETHER)                                                                    \
        avx512_finish(job, start + i, rows - i < TOGETHER ? rows - i : TOGETHER, sums[i], amx_STRIDE);                \
    }                                                                                                                 \
    _tile_release();                                                                                                  \
  }

AMX_MANY(bf16)
AMX_MANY(int8)
AMX_MANY(grouped)

static void run(struct job *job, int64_t unit, int64_t most, int64_t work_to_do, int32_t threads);

/* y [tokens, R] = x [tokens, C] times the weight's transpose, plus the bias; all but int8 values of bfloat16. */
static int32_t amx_product(const struct matrix *matrix, const uint8_t *x, int64_t tokens, uint8_t *y, int32_t threads) {
  const int64_t columns = matrix->columns, width = (columns + amx_DEPTH - 1) / amx_DEPTH * amx_DEPTH;
  const int64_t times = (tokens + amx_MOST - 1) / amx_MOST, pair = 2 * amx_SIDE;
  const int64_t most = ((tokens + times - 1) / times + pair - 1) / pair * pair;
  uint8_t *memory = malloc((size_t)(width * most) * 2 + 64);
  if (memory == NULL) return NO_MEMORY;
  for (int64_t start = 0; start < tokens; start += most) {
    struct job job = {.matrix = matrix, .x = x + 2 * start * columns, .y = y + 2 * start * matrix->rows, .width = width,
                      .y_type = BF16, .tokens = tokens - start < most ? tokens - start : most,
                      .panels = (float *)(void *)(memory + (64 - (uintptr_t)memory % 64) % 64)};
    job.loop = amx_pairs, job.first = 0, job.last = width;
    run(&job, amx_DEPTH, INT64_MAX, columns * job.tokens, threads);
    job.loop = matrix->type == BF16 ? amx_many_bf16 : matrix->type == INT8 ? amx_many_int8 : amx_many_grouped;
    job.last = matrix->rows;
    run(&job, pair, amx_ROWS_TOGETHER, matrix->rows * columns * job.tokens, threads);
  }
  free(memory);
  return FINE;
}
