/* Products with packed weights: a bitmask says where a weight [R, C] is not zero, and those values stand one after the
   other. Python loads this file as a shared library (kernel.py) and calls the functions whose names begin with atp_.

   All loops have one form. The columns of a row go in blocks of 64, one word of the mask each, and a block in steps of
   LANES columns. `expand` makes a vector of weights from the next values and the bits of a step, with zeros between;
   each vector is multiplied by the x of every token. ROWS rows go together, so that the sums of one need not wait for
   each other. The loops are macros over an instruction set (ISA) and a type of the values (TYPE); an instruction set is
   the functions and constants ISA_... below.

   A step reads a whole vector of values, however many of them it takes. So a row is read where it is only if it would
   end inside the array with all its columns and a block more; the last ones are read in a copy with zeros after it
   (`write_tail`, or `bounded` for a block). Nothing outside the arrays is ever read, even if the offsets are wrong.

   Processors do not foresee that the ROWS rows after these follow: rows are short. So each step asks for what the same
   step of a later row will read, AHEAD bytes after the last of these rows; the rows together ask for each byte once.

   Each sum is made by one thread in an order that depends on the columns only: bits do not depend on the number of
   threads, nor on how many tokens go together. */

#if defined(__linux__)
#define _GNU_SOURCE /* syscall, sched_yield */
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef EMULATED_AVX512 /* tests run the AVX-512 loops on other CPUs: a header with its intrinsics */
#include EMULATED_AVX512
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11) /* older ones have no tiles */
#define WITH_AMX
#endif

enum { BLOCK = 64, MOST_TOKENS = 8, GROUP = 32 }; /* columns; tokens; columns that divide every group of scales */
enum { AHEAD = 2048 }; /* bytes; see PRODUCT */
/* Of products of many tokens, see there. STRIDE is no power of 2: the cache would have few places for its columns. */
enum { PART = 64, TOGETHER = 64, MANY = 384, STRIDE = MANY + 16 };
enum type { BF16, HALF, FLOAT, INT8, GROUPED_INT8, DENSE_BF16, DENSE_FLOAT, TYPES };
enum isa { PORTABLE, AVX2, AVX512, AVX512_BF16, NEON, AVX512_VBMI2, AMX, ISAS };
enum error { FINE, WRONG_ARGUMENT, NO_MEMORY, NOT_FINITE };

/* The same as kernel.py's Structure. For a dense weight, `bitmask` and `offsets` are not read. */
struct matrix {
  const uint8_t *values;
  const uint8_t *bitmask;
  const int64_t *offsets; /* [R], the place of each row's first value */
  const uint8_t *scales;  /* float32 [R, groups], of int8 values */
  const uint8_t *bias;    /* [R] of `bias_type`, or NULL */
  void *parallel;         /* GOMP_parallel of torch's OpenMP runtime, or NULL */
  int64_t rows, columns, count, groups; /* `count` of the values */
  int32_t type, bias_type, isa, alone;  /* `alone`: multiplications up to which one thread works */
  const uint8_t *zeros; /* of codes, as kernel_codes.h has them: of each block its zero point, [R, C / BLOCK], */
  float unit;           /* and what its scale, a float16, is multiplied by */
  int32_t bits;         /* of a code */
};

/* What the threads of a call share. */
struct job {
  const struct matrix *matrix;
  const void *x;  /* [tokens, width], float32 or, for dot products of bfloat16, bfloat16; zeros from C on;
                    its columns as `sort` of the variant puts them */
  int64_t width;  /* columns, a multiple of BLOCK */
  int64_t tokens; /* that y has; the loop has as many, or more */
  uint8_t *y;     /* [tokens, R], or of an unpacked weight [last - first, C] */
  int32_t y_type;
  void (*loop)(const struct job *, int64_t, int64_t);
  int64_t first, last, chunk; /* rows */
  _Atomic int64_t next;
  const uint8_t *tail; /* the values from number `tail_at` on, then zeros: see `write_tail` */
  uint64_t tail_at;
  float *panels;     /* of x, for many tokens */
  _Atomic int not_finite; /* whether an x is infinite or no number */
};

typedef void (*loop)(const struct job *, int64_t, int64_t);

/* --- numbers */

INLINE float float_of_bits(uint64_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

INLINE uint16_t load16(const uint8_t *at) {
  uint16_t bits;
  memcpy(&bits, at, sizeof bits);
  return bits;
}

INLINE float load_float(const uint8_t *at) {
  float value;
  memcpy(&value, at, sizeof value);
  return value;
}

INLINE float load_bf16(const uint8_t *at) { return float_of_bits((uint32_t)load16(at) << 16); }

INLINE float load_half(const uint8_t *at) {
  uint32_t bits = load16(at), sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) return float_of_bits(sign | bits_of_float((float)rest * 0x1p-24f));
  return float_of_bits(sign | (rest + (112 << 10)) << 13);
}

INLINE uint16_t bf16_of(float value) { /* the nearest, of two the even one; NaN stays NaN */
  uint32_t bits = bits_of_float(value), up = bits + 0x7fff + (bits >> 16 & 1);
  return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : up >> 16);
}

INLINE uint16_t half_of(float value) {
  uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x1ff));
  if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds to 65536 or more: infinite */
  if (rest < 0x38800000) /* below 2^-14: units of 2^-24, which the addition rounds to */
    return (uint16_t)(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - bits_of_float(0.5f)));
  rest += 0xfff + (rest >> 13 & 1);
  return (uint16_t)(sign | ((rest >> 13) - (112 << 10)));
}

INLINE float load_number(const uint8_t *at, int32_t type, int64_t index) {
  if (type == BF16) return load_bf16(at + 2 * index);
  if (type == HALF) return load_half(at + 2 * index);
  return load_float(at + 4 * index);
}

INLINE void store_number(float value, uint8_t *at, int32_t type, int64_t index) {
  uint16_t narrow = type == BF16 ? bf16_of(value) : half_of(value);
  if (type == FLOAT)
    memcpy(at + 4 * index, &value, 4);
  else
    memcpy(at + 2 * index, &narrow, 2);
}

INLINE int64_t size_of(int32_t type) { return type == FLOAT ? 4 : 2; }

INLINE uint64_t load_mask(const uint8_t *at, int64_t bytes) { /* bit k is column k; no byte after `bytes` is read */
  uint64_t mask = 0;
  if (bytes >= 8) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    memcpy(&mask, at, sizeof mask);
#else
    for (int k = 0; k < 8; k++) mask |= (uint64_t)at[k] << 8 * k;
#endif
  } else {
    for (int k = 0; k < bytes; k++) mask |= (uint64_t)at[k] << 8 * k;
  }
  return mask;
}

INLINE uint32_t load_mask32(const uint8_t *at, int64_t bytes) {
  uint32_t mask = 0;
  if (bytes >= 4) {
    for (int k = 0; k < 4; k++) mask |= (uint32_t)at[k] << 8 * k;
  } else {
    for (int k = 0; k < bytes; k++) mask |= (uint32_t)at[k] << 8 * k;
  }
  return mask;
}

/* The vectors that a tile takes for so many tokens, which may be more than it has: as `add_part` can hold. */
INLINE int64_t vectors_of(int64_t tokens, int64_t lanes, int64_t wide) {
  int64_t vectors = tokens < wide ? (tokens + lanes - 1) / lanes : wide / lanes;
  return vectors > 8 ? 12 : vectors > 4 ? 8 : vectors > 2 ? 4 : 2;
}

INLINE uint64_t rotated_left(uint64_t mask, int by) { return mask << (by & 63) | mask >> (-by & 63); }

/* The values from `at` on, up to `limit`, then zeros: BLOCK of them. */
static __attribute__((noinline)) const uint8_t *bounded(const uint8_t *values, uint64_t at, uint64_t limit,
                                                        uint64_t size, uint8_t *buffer) {
  uint64_t left = at < limit ? limit - at : 0;
  if (left > BLOCK) left = BLOCK;
  memset(buffer + left * size, 0, (BLOCK - left) * size);
  if (left > 0) memcpy(buffer, values + at * size, left * size);
  return buffer;
}

/* Where the BLOCK values from number `at` on are read: in the array, or at its end in the buffer. */
INLINE const uint8_t *block_at(const struct matrix *matrix, uint64_t at, uint64_t size, uint8_t *buffer) {
  const uint64_t limit = (uint64_t)matrix->count;
  return at < limit && limit - at >= BLOCK ? matrix->values + at * size
                                           : bounded(matrix->values, at, limit, size, buffer);
}

/* Where the values of a row that begin with number `at` are read: in the array, or in the tail. */
INLINE const uint8_t *values_of(const struct job *job, int64_t at, int64_t size) {
  const uint64_t place = (uint64_t)at, count = (uint64_t)job->matrix->count;
  if (place < job->tail_at) return job->matrix->values + at * size;
  return job->tail + (int64_t)((place < count ? place : count) - job->tail_at) * size;
}

/* --- tables by the 8 bits of a step: where in the values the one of each column is. A step's bits are kept times 32,
   the length of an entry. In byte shuffles 0x80 makes a zero. */

static struct {
  _Alignas(32) uint8_t bf16[256 * 32]; /* to the high half of 32 bits: a float32 */
  uint8_t int8[256 * 32];              /* to the highest byte of 32 bits: value * 2^24 */
  uint8_t half[256 * 32];              /* 16 bytes of each entry */
  uint8_t bytes[256 * 32];             /* of float32, for NEON */
  uint8_t floats[256 * 32];            /* of float32, for AVX2: int32, negative makes a zero */
  uint16_t ranks[256][8];              /* the columns of the bits, one after the other */
  uint8_t counts[256];
  _Alignas(64) uint8_t code_bytes[9][64], code_shifts[9][8][64]; /* of codes, by their bits and the first bit's place */
} tables;

#if defined(WITH_AMX)
static int amx_allowed(void);
#endif

/* Fills the tables; returns bit 1 << isa for each instruction set that was compiled. Call it once, before all else. */
int32_t atp_setup(void) {
  for (int bits = 0; bits < 256; bits++) {
    int32_t rank = 0;
    for (int column = 0; column < 8; column++) {
      int is = bits >> column & 1, at = 32 * bits + 4 * column;
      for (int byte = 0; byte < 4; byte++) {
        tables.bf16[at + byte] = (uint8_t)(is && byte >= 2 ? 2 * rank + byte - 2 : 0x80);
        tables.int8[at + byte] = (uint8_t)(is && byte == 3 ? rank : 0x80);
        tables.bytes[at + byte] = (uint8_t)(is ? 4 * rank + byte : 0x80);
      }
      for (int byte = 0; byte < 2; byte++)
        tables.half[32 * bits + 2 * column + byte] = (uint8_t)(is ? 2 * rank + byte : 0x80);
      memcpy(tables.floats + at, is ? &rank : &(int32_t){-1}, sizeof rank);
      if (is) tables.ranks[bits][rank] = (uint16_t)column;
      rank += is;
    }
    tables.counts[bits] = (uint8_t)rank;
  }
  for (int bits = 1; bits <= 8; bits++) {
    for (int place = 0; place < 64; place++) {
      tables.code_bytes[bits][place] = (uint8_t)(place / 8 * bits + place % 8);
      for (int first = 0; first < 8; first++)
        tables.code_shifts[bits][first][place] = (uint8_t)(place % 8 * bits + first);
    }
  }
  int32_t compiled = 1 << PORTABLE;
#if defined(__x86_64__)
  compiled |= 1 << AVX2 | 1 << AVX512 | 1 << AVX512_BF16 | 1 << AVX512_VBMI2;
#if defined(WITH_AMX)
  compiled |= amx_allowed() << AMX;
#endif
#elif defined(__aarch64__)
  compiled |= 1 << NEON;
#endif
  return compiled;
}

/* --- types of values: bytes of each; whether scales are one per row (1) or per group (2); whether zeros are stored */

enum { SIZE_bf16 = 2, SIZE_half = 2, SIZE_float = 4, SIZE_int8 = 1, SIZE_grouped = 1 };
enum { SCALED_bf16 = 0, SCALED_half = 0, SCALED_float = 0, SCALED_int8 = 1, SCALED_grouped = 2 };
enum { DENSE_bf16 = 0, DENSE_half = 0, DENSE_float = 0, DENSE_int8 = 0, DENSE_grouped = 0 };
enum { SIZE_dense16 = 2, SCALED_dense16 = 0, DENSE_dense16 = 1 };
enum { SIZE_dense32 = 4, SCALED_dense32 = 0, DENSE_dense32 = 1 };

/* --- the loops. Each array has a length known to the compiler, and stands in registers once they are unrolled. */

#define PRODUCT(ISA, TYPE, ROWS, TOKENS)                                                                              \
  ISA##_TARGET static void ISA##_##TYPE##_##TOKENS(const struct job *job, int64_t first, int64_t last) {              \
    const struct matrix *matrix = job->matrix;                                                                        \
    const int64_t columns = matrix->columns, stride = (columns + 7) / 8;                                              \
    const int64_t group_width = SCALED_##TYPE == 2 ? columns / matrix->groups : 0;                                    \
    for (int64_t start = first; start < last; start += ROWS) {                                                        \
      ISA##_sums sums[ROWS][TOKENS];                                                                                  \
      int64_t row[ROWS], left = 0, group = -1;                                                                        \
      const uint8_t *from[ROWS], *bits_from[ROWS];                                                                    \
      ISA##_UNROLL for (int i = 0; i < ROWS; i++) {                                                                   \
        row[i] = start + i < last ? start + i : last - 1; /* the last again, so that there are ROWS */                \
        from[i] = values_of(job, DENSE_##TYPE ? row[i] * columns : matrix->offsets[row[i]], SIZE_##TYPE);             \
        bits_from[i] = DENSE_##TYPE ? NULL : matrix->bitmask + row[i] * stride;                                       \
        ISA##_UNROLL for (int t = 0; t < TOKENS; t++) sums[i][t] = ISA##_zero();                                      \
      }                                                                                                               \
      const uintptr_t ahead = (uintptr_t)from[ROWS - 1] - (uintptr_t)from[0] + AHEAD;                                 \
      const ISA##_input *x = (const ISA##_input *)job->x;                                                             \
      for (int64_t column = 0; column < columns; column += BLOCK) {                                                   \
        uint64_t mask[ROWS];                                                                                          \
        if (DENSE_##TYPE) {                                                                                           \
          for (int i = 0; i < ROWS; i++) mask[i] = 0;                                                                 \
        } else if (columns - column > BLOCK - 8) {                                                                    \
          ISA##_UNROLL for (int i = 0; i < ROWS; i++) mask[i] = load_mask(bits_from[i] + column / 8, 8);              \
          __builtin_prefetch(bits_from[0] + ROWS * (stride + column / 8));                                            \
        } else {                                                                                                      \
          for (int i = 0; i < ROWS; i++) mask[i] = load_mask(bits_from[i] + column / 8, stride - column / 8);         \
        }                                                                                                             \
        ISA##_UNROLL for (int i = 0; i < ROWS; i++) mask[i] = rotated_left(mask[i], ISA##_SHIFT);                     \
        ISA##_STEPS for (int step = 0; step < BLOCK; step += ISA##_LANES, x += ISA##_LANES) {                         \
          ISA##_weights weights[ROWS];                                                                                \
          if (SCALED_##TYPE == 2 && step % GROUP == 0) {                                                              \
            if (left <= 0) group = group + 1 < matrix->groups ? group + 1 : group, left = group_width;                \
            left -= (int)ISA##_LANES > (int)GROUP ? (int)ISA##_LANES : (int)GROUP;                                    \
          }                                                                                                           \
          ISA##_UNROLL for (int i = 0; i < ROWS; i++) {                                                               \
            uint64_t bits = mask[i] & ISA##_BITS;                                                                     \
            mask[i] = rotated_left(mask[i], BLOCK - ISA##_LANES);                                                     \
            weights[i] = ISA##_expand_##TYPE(from[i], bits);                                                          \
            if (step % (64 / SIZE_##TYPE) == 0) __builtin_prefetch((const void *)((uintptr_t)from[i] + ahead));       \
            from[i] += SIZE_##TYPE * (DENSE_##TYPE ? ISA##_LANES : ISA##_count(bits));                                \
            if (SCALED_##TYPE == 2)                                                                                   \
              weights[i] = ISA##_times(                                                                               \
                  weights[i],                                                                                         \
                  ISA##_UNIT * load_float(matrix->scales + 4 * (row[i] * matrix->groups + group)));                   \
          }                                                                                                           \
          ISA##_UNROLL for (int t = 0; t < TOKENS; t++) {                                                             \
            ISA##_weights inputs = ISA##_inputs(x + t * job->width);                                                  \
            ISA##_UNROLL for (int i = 0; i < ROWS; i++) sums[i][t] = ISA##_add(sums[i][t], weights[i], inputs);       \
          }                                                                                                           \
        }                                                                                                             \
      }                                                                                                               \
      ISA##_UNROLL for (int i = 0; i < ROWS; i++) {                                                                   \
        float scale = SCALED_##TYPE == 1 ? ISA##_UNIT * load_float(matrix->scales + 4 * row[i]) : 1;                  \
        float bias = matrix->bias ? load_number(matrix->bias, matrix->bias_type, row[i]) : 0;                         \
        ISA##_UNROLL for (int t = 0; t < TOKENS; t++)                                                                 \
          if (t < job->tokens) /* fewer than the loop has */                                                          \
            store_number(ISA##_total(sums[i][t]) * scale + bias, job->y, job->y_type, t * matrix->rows + row[i]);     \
      }                                                                                                               \
    }                                                                                                                 \
  }

#define UNPACK(ISA, TYPE)                                                                                             \
  ISA##_TARGET static void ISA##_unpack_##TYPE(const struct job *job, int64_t first, int64_t last) {                  \
    const struct matrix *matrix = job->matrix;                                                                        \
    const int64_t columns = matrix->columns, stride = (columns + 7) / 8, size = size_of(job->y_type);                 \
    const int64_t group_width = SCALED_##TYPE ? columns / matrix->groups : 1;                                         \
    for (int64_t row = first; row < last; row++) {                                                                    \
      uint64_t at = (uint64_t)matrix->offsets[row];                                                                   \
      for (int64_t column = 0; column < columns; column += BLOCK) {                                                   \
        uint64_t mask = load_mask(matrix->bitmask + row * stride + column / 8, stride - column / 8);                  \
        uint8_t buffer[BLOCK * SIZE_##TYPE];                                                                          \
        _Alignas(64) float weights[BLOCK];                                                                            \
        const uint8_t *from = block_at(matrix, at, SIZE_##TYPE, buffer);                                              \
        at += (uint64_t)__builtin_popcountll(mask);                                                                   \
        ISA##_STEPS for (int step = 0; step < BLOCK; step += ISA##_LANES) {                                           \
          uint64_t bits = rotated_left(mask, ISA##_SHIFT + BLOCK - step) & ISA##_BITS;                                \
          ISA##_weights expanded = ISA##_expand_##TYPE(from, bits);                                                   \
          from += SIZE_##TYPE * ISA##_count(bits);                                                                    \
          if (SCALED_##TYPE) {                                                                                        \
            int64_t group = (column + step) / group_width;                                                            \
            if (group >= matrix->groups) group = matrix->groups - 1; /* after the last column */                      \
            expanded = ISA##_times(                                                                                   \
                expanded, ISA##_UNIT * load_float(matrix->scales + 4 * (row * matrix->groups + group)));              \
          }                                                                                                           \
          ISA##_store(weights + step, expanded);                                                                      \
        }                                                                                                             \
        int64_t place = (row - job->first) * columns + column;                                                        \
        int64_t length = columns - column < BLOCK ? columns - column : BLOCK;                                         \
        if (job->y_type == FLOAT) {                                                                                   \
          memcpy(job->y + place * size, weights, (size_t)(length * size));                                            \
        } else {                                                                                                      \
          uint16_t narrow[BLOCK];                                                                                     \
          if (job->y_type == BF16)                                                                                    \
            for (int k = 0; k < BLOCK; k++) narrow[k] = bf16_of(weights[k]);                                          \
          else                                                                                                        \
            ISA##_narrow(weights, narrow);                                                                            \
          memcpy(job->y + place * size, narrow, (size_t)(length * size));                                             \
        }                                                                                                             \
      }                                                                                                               \
    }                                                                                                                 \
  }

/* --- products of many tokens. Up to MANY tokens are transposed to tiles of WIDE tokens, [columns, tokens]: each
   nonzero weight is multiplied by vectors of tokens, and a zero costs nothing. TOGETHER rows go through PART columns at
   a time, whose x of one tile fit into the first cache: `read` writes their weights one after the other, each with the
   place of its column in the tile; `add_part` holds the sums of a row and a tile in registers. Each sum is made in the
   order of the columns. */

#define READ_PART(ISA, TYPE)                                                                                          \
  ISA##_TARGET INLINE int32_t ISA##_read_##TYPE(const struct matrix *matrix, int64_t row, int64_t column, uint64_t *at,\
                                                float *weights, uint16_t *places) {                                   \
    const int64_t stride = (matrix->columns + 7) / 8, group_width = matrix->columns / matrix->groups;                 \
    int32_t count = 0;                                                                                                \
    for (int64_t step = 0; step < PART && column + step < matrix->columns; step += GROUP) {                           \
      const int64_t byte = (column + step) / 8;                                                                       \
      const uint32_t mask = load_mask32(matrix->bitmask + row * stride + byte, stride - byte);                        \
      uint8_t buffer[BLOCK * SIZE_##TYPE];                                                                            \
      const uint8_t *from = block_at(matrix, *at, SIZE_##TYPE, buffer);                                               \
      float scale = 1;                                                                                                \
      if (SCALED_##TYPE == 2) {                                                                                       \
        int64_t group = (column + step) / group_width;                                                                \
        scale = ISA##_UNIT * load_float(matrix->scales + 4 * (row * matrix->groups + group));                         \
      }                                                                                                               \
      for (int k = 0; k < GROUP; k += ISA##_LANES) {                                                                  \
        ISA##_weights values = ISA##_##TYPE##_at(from + k * SIZE_##TYPE);                                             \
        ISA##_store_anywhere(weights + count + k, SCALED_##TYPE == 2 ? ISA##_times(values, scale) : values);          \
      }                                                                                                               \
      for (int k = 0; k < 4; k++) {                                                                                   \
        uint8_t bits = (uint8_t)(mask >> 8 * k);                                                                      \
        ISA##_place(places + count, tables.ranks[bits], (int)step + 8 * k, ISA##_WIDE);                               \
        count += tables.counts[bits];                                                                                 \
      }                                                                                                               \
      *at += (uint64_t)__builtin_popcount(mask);                                                                      \
    }                                                                                                                 \
    for (int32_t k = 0; k < count * SIZE_##TYPE; k += 64) /* no prefetcher follows so many rows */                    \
      __builtin_prefetch((const void *)((uintptr_t)matrix->values + (*at + PART) * SIZE_##TYPE + (uintptr_t)k));      \
    return count;                                                                                                     \
  }

#define ADD_PART(ISA, TILE)                                                                                           \
  ISA##_TARGET INLINE void ISA##_add_part_##TILE(float *sums, const float *x, const float *weights,                   \
                                                 const uint16_t *places, int32_t count) {                             \
    ISA##_sums in[TILE];                                                                                              \
    UNROLL for (int v = 0; v < TILE; v++) in[v] = ISA##_load(sums + v * ISA##_LANES);                                 \
    for (int32_t k = 0; k < count; k++) {                                                                             \
      const float *from = x + places[k];                                                                              \
      ISA##_weights weight = ISA##_same(weights[k]);                                                                  \
      UNROLL for (int v = 0; v < TILE; v++) in[v] = ISA##_add(in[v], weight, ISA##_load(from + v * ISA##_LANES));     \
    }                                                                                                                 \
    UNROLL for (int v = 0; v < TILE; v++) ISA##_store(sums + v * ISA##_LANES, in[v]);                                 \
  }

#define MANY_TOKENS(ISA, TYPE)                                                                                        \
  READ_PART(ISA, TYPE)                                                                                                \
  ISA##_TARGET static void ISA##_many_##TYPE(const struct job *job, int64_t first, int64_t last) {                    \
    const struct matrix *matrix = job->matrix;                                                                        \
    const int64_t columns = matrix->columns, tiles = (job->tokens + ISA##_WIDE - 1) / ISA##_WIDE;                     \
    _Alignas(64) float sums[TOGETHER][STRIDE];                                                                        \
    _Alignas(64) float weights[TOGETHER * PART + GROUP];                                                              \
    uint16_t places[TOGETHER * PART + GROUP];                                                                         \
    int32_t starts[TOGETHER + 1] = {0};                                                                               \
    uint64_t at[TOGETHER];                                                                                            \
    for (int64_t start = first; start < last; start += TOGETHER) {                                                    \
      const int64_t rows = last - start < TOGETHER ? last - start : TOGETHER;                                         \
      for (int64_t i = 0; i < rows; i++) {                                                                            \
        at[i] = (uint64_t)matrix->offsets[start + i];                                                                 \
        memset(sums[i], 0, sizeof sums[i]);                                                                           \
      }                                                                                                               \
      for (int64_t column = 0; column < columns; column += PART) {                                                    \
        for (int64_t i = 0; i < rows; i++)                                                                            \
          starts[i + 1] = starts[i] + ISA##_read_##TYPE(matrix, start + i, column, at + i, weights + starts[i],       \
                                                        places + starts[i]);                                          \
        for (int64_t tile = 0; tile < tiles; tile++) {                                                                \
          const float *x = job->panels + (tile * columns + column) * ISA##_WIDE;                                      \
          const int64_t vectors = vectors_of(job->tokens - tile * ISA##_WIDE, ISA##_LANES, ISA##_WIDE);               \
          for (int64_t i = 0; i < rows; i++) {                                                                        \
            float *to = sums[i] + tile * ISA##_WIDE;                                                                  \
            const float *of = weights + starts[i];                                                                    \
            const uint16_t *from = places + starts[i];                                                                \
            const int32_t count = starts[i + 1] - starts[i];                                                          \
            if (vectors == 12)                                                                                        \
              ISA##_add_part_12(to, x, of, from, count);                                                              \
            else if (vectors == 8)                                                                                    \
              ISA##_add_part_8(to, x, of, from, count);                                                               \
            else if (vectors == 4)                                                                                    \
              ISA##_add_part_4(to, x, of, from, count);                                                               \
            else                                                                                                      \
              ISA##_add_part_2(to, x, of, from, count);                                                               \
          }                                                                                                           \
        }                                                                                                             \
      }                                                                                                               \
      ISA##_finish(job, start, rows, sums[0], STRIDE);                                                                \
    }                                                                                                                 \
  }

/* Sums to y: rows become columns. */
#define FINISH(ISA)                                                                                                   \
  ISA##_TARGET static void ISA##_finish(const struct job *job, int64_t start, int64_t rows, const float *sums,        \
                                        int64_t stride) {                                                             \
    const struct matrix *matrix = job->matrix;                                                                        \
    const int64_t size = size_of(job->y_type);                                                                        \
    float scales[TOGETHER], biases[TOGETHER];                                                                         \
    for (int64_t i = 0; i < TOGETHER; i++) {                                                                          \
      const int64_t row = start + (i < rows ? i : rows - 1);                                                          \
      scales[i] = matrix->type == INT8 ? ISA##_UNIT * load_float(matrix->scales + 4 * row) : 1;                       \
      biases[i] = matrix->bias ? load_number(matrix->bias, matrix->bias_type, row) : 0;                               \
    }                                                                                                                 \
    for (int64_t first = 0; first < job->tokens; first += 8) {                                                        \
      _Alignas(64) float lines[8][TOGETHER];                                                                          \
      for (int64_t i = 0; i < rows; i += 8)                                                                           \
        ISA##_transpose(sums + i * stride + first, stride, lines[0] + i, TOGETHER);                                   \
      for (int64_t t = 0; t < 8 && first + t < job->tokens; t++) {                                                    \
        uint8_t *to = job->y + ((first + t) * matrix->rows + start) * size;                                           \
        uint16_t narrow[TOGETHER];                                                                                    \
        for (int i = 0; i < TOGETHER; i++) lines[t][i] = lines[t][i] * scales[i] + biases[i];                         \
        if (job->y_type == HALF)                                                                                      \
          ISA##_narrow(lines[t], narrow);                                                                             \
        else if (job->y_type == BF16)                                                                                 \
          for (int i = 0; i < TOGETHER; i++) narrow[i] = bf16_of(lines[t][i]);                                        \
        if (job->y_type == FLOAT)                                                                                     \
          memcpy(to, lines[t], (size_t)(rows * size));                                                                \
        else if (rows == TOGETHER)                                                                                    \
          memcpy(to, narrow, sizeof narrow); /* two registers */                                                      \
        else                                                                                                          \
          memcpy(to, narrow, (size_t)(rows * size));                                                                  \
      }                                                                                                               \
    }                                                                                                                 \
  }

/* Columns `first` to `last` of x [tokens, C] to the tiles. */
#define TILES(ISA)                                                                                                    \
  ISA##_TARGET static void ISA##_tiles(const struct job *job, int64_t first, int64_t last) {                          \
    enum { WIDE = ISA##_WIDE };                                                                                       \
    const int64_t whole = job->tokens / WIDE * WIDE, rest = job->tokens - whole;                                      \
    const int64_t filled = whole + (rest > 0 ? vectors_of(rest, ISA##_LANES, WIDE) * ISA##_LANES : 0);                \
    const int64_t columns = job->matrix->columns, size = size_of(job->y_type);                                        \
    uint32_t largest = 0;                                                                                             \
    for (int64_t column = first; column < last; column += BLOCK) {                                                    \
      const int64_t length = last - column < BLOCK ? last - column : BLOCK;                                           \
      _Alignas(64) float lines[8][BLOCK] = {{0}};                                                                     \
      for (int64_t start = 0; start < filled; start += 8) {                                                           \
        for (int64_t t = 0; t < 8; t++) {                                                                             \
          const uint8_t *from = (const uint8_t *)job->x + ((start + t) * columns + column) * size;                    \
          if (start + t < job->tokens)                                                                                \
            ISA##_widen(from, job->y_type, length, lines[t]);                                                         \
          else                                                                                                        \
            memset(lines[t], 0, sizeof lines[t]);                                                                     \
          for (int k = 0; k < BLOCK; k++) {                                                                           \
            const uint32_t bits = bits_of_float(lines[t][k]) & 0x7fffffff;                                            \
            largest = bits > largest ? bits : largest;                                                                \
          }                                                                                                           \
        }                                                                                                             \
        float *to = job->panels + (start / WIDE * columns + column) * WIDE + start % WIDE;                            \
        int64_t k = 0;                                                                                                \
        for (; k + 8 <= length; k += 8) ISA##_transpose(lines[0] + k, BLOCK, to + k * WIDE, WIDE);                    \
        for (; k < length; k++)                                                                                       \
          for (int t = 0; t < 8; t++) to[k * WIDE + t] = lines[t][k];                                                 \
      }                                                                                                               \
    }                                                                                                                 \
    if (largest >= 0x7f800000) atomic_store(&((struct job *)(uintptr_t)job)->not_finite, 1);                          \
  }

#define MANIES(ISA)                                                                                                   \
  ADD_PART(ISA, 2) ADD_PART(ISA, 4) ADD_PART(ISA, 8) ADD_PART(ISA, 12) TILES(ISA) FINISH(ISA)                         \
  MANY_TOKENS(ISA, bf16) MANY_TOKENS(ISA, half) MANY_TOKENS(ISA, float) MANY_TOKENS(ISA, int8)                        \
  MANY_TOKENS(ISA, grouped)

#define PRODUCTS(ISA, TYPE)                                                                                           \
  PRODUCT(ISA, TYPE, 4, 1)                                                                                            \
  PRODUCT(ISA, TYPE, 4, 2) PRODUCT(ISA, TYPE, ISA##_ROWS_OF_4, 4) PRODUCT(ISA, TYPE, ISA##_ROWS_OF_8, 8)
#define LOOPS(ISA)                                                                                                    \
  PRODUCTS(ISA, bf16) PRODUCTS(ISA, half) PRODUCTS(ISA, float) PRODUCTS(ISA, int8) PRODUCTS(ISA, grouped)             \
  PRODUCTS(ISA, dense16) PRODUCTS(ISA, dense32)                                                                       \
  UNPACK(ISA, bf16) UNPACK(ISA, half) UNPACK(ISA, float) UNPACK(ISA, int8)                                            \
  ISA##_TARGET static void ISA##_widen(const uint8_t *in, int32_t type, int64_t count, float *out) {                  \
    int64_t k = 0;                                                                                                    \
    if (type == HALF) k = ISA##_widen_halves(in, count, out);                                                         \
    if (type == BF16)                                                                                                 \
      for (; k < count; k++) out[k] = load_bf16(in + 2 * k);                                                          \
    else                                                                                                              \
      for (; k < count; k++) out[k] = load_number(in, type, k);                                                       \
  }

/* --- portable: vectors of 8 floats, which a compiler may put into its registers */

typedef struct {
  float lane[8];
} portable_weights;
typedef portable_weights portable_sums;
typedef float portable_input;
enum { portable_LANES = 8, portable_BITS = 0xff, portable_SHIFT = 0, portable_ROWS_OF_4 = 2, portable_ROWS_OF_8 = 1 };
#define portable_TARGET
#define portable_UNIT 1.0f
#define portable_STEPS
#define portable_UNROLL

#define PORTABLE_EXPAND(TYPE, LOAD)                                                                                   \
  INLINE portable_weights portable_expand_##TYPE(const uint8_t *from, uint64_t bits) {                                \
    portable_weights out;                                                                                             \
    for (int k = 0; k < 8; k++) {                                                                                     \
      int is = DENSE_##TYPE ? 1 : bits >> k & 1;                                                                      \
      out.lane[k] = is ? LOAD(from) : 0;                                                                              \
      from += is * SIZE_##TYPE;                                                                                       \
    }                                                                                                                 \
    return out;                                                                                                       \
  }
#define LOAD_INT8(at) ((float)(int8_t) * (at))
PORTABLE_EXPAND(bf16, load_bf16)
PORTABLE_EXPAND(half, load_half)
PORTABLE_EXPAND(float, load_float)
PORTABLE_EXPAND(int8, LOAD_INT8)
PORTABLE_EXPAND(grouped, LOAD_INT8)
PORTABLE_EXPAND(dense16, load_bf16)
PORTABLE_EXPAND(dense32, load_float)

INLINE uint64_t portable_count(uint64_t bits) { return (uint32_t)__builtin_popcountll(bits); }
INLINE portable_sums portable_zero(void) { return (portable_sums){{0}}; }
INLINE portable_weights portable_load(const float *at) {
  portable_weights out;
  memcpy(out.lane, at, sizeof out.lane);
  return out;
}
INLINE void portable_store(float *at, portable_weights in) { memcpy(at, in.lane, sizeof in.lane); }
INLINE portable_weights portable_times(portable_weights in, float factor) {
  for (int k = 0; k < 8; k++) in.lane[k] *= factor;
  return in;
}
INLINE portable_sums portable_add(portable_sums sums, portable_weights weights, portable_weights inputs) {
  for (int k = 0; k < 8; k++) sums.lane[k] += weights.lane[k] * inputs.lane[k];
  return sums;
}
INLINE float portable_total(portable_sums sums) {
  const float *s = sums.lane;
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}
INLINE void portable_narrow(const float *in, uint16_t *out) {
  for (int k = 0; k < BLOCK; k++) out[k] = half_of(in[k]);
}
INLINE int64_t portable_widen_halves(const uint8_t *in, int64_t count, float *out) {
  (void)in, (void)count, (void)out;
  return 0;
}
#define portable_inputs portable_load
LOOPS(portable)

#if defined(__x86_64__)

/* --- AVX2: one byte shuffle expands, zeroes and, but for float16, widens */

#ifdef EMULATED_AVX512
#define avx2_TARGET
#else
#define avx2_TARGET __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#endif
#define AVX2_INLINE avx2_TARGET INLINE
typedef __m256 avx2_weights, avx2_sums;
typedef float avx2_input;
enum { avx2_LANES = 8, avx2_WIDE = 12 * 8, avx2_BITS = 0xff << 5, avx2_SHIFT = 5 };
enum { avx2_ROWS_OF_4 = 2, avx2_ROWS_OF_8 = 1 };
#define avx2_UNIT 0x1p-24f
#define avx2_STEPS
#define avx2_UNROLL UNROLL

AVX2_INLINE __m256 avx2_expand_bf16(const uint8_t *from, uint64_t bits) {
  __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)from));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(values, *(const __m256i *)(tables.bf16 + bits)));
}
AVX2_INLINE __m256 avx2_expand_half(const uint8_t *from, uint64_t bits) {
  __m128i values = _mm_loadu_si128((const __m128i *)from);
  return _mm256_cvtph_ps(_mm_shuffle_epi8(values, *(const __m128i *)(tables.half + bits)));
}
AVX2_INLINE __m256 avx2_expand_float(const uint8_t *from, uint64_t bits) {
  __m256i places = *(const __m256i *)(tables.floats + bits);
  __m256 values = _mm256_permutevar8x32_ps(_mm256_loadu_ps((const float *)from), places);
  return _mm256_blendv_ps(values, _mm256_setzero_ps(), _mm256_castsi256_ps(places));
}
AVX2_INLINE __m256 avx2_expand_int8(const uint8_t *from, uint64_t bits) {
  int64_t values;
  memcpy(&values, from, sizeof values);
  return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(_mm256_set1_epi64x(values), *(const __m256i *)(tables.int8 + bits)));
}
AVX2_INLINE __m256 avx2_expand_grouped(const uint8_t *from, uint64_t bits) { return avx2_expand_int8(from, bits); }
AVX2_INLINE __m256 avx2_expand_dense16(const uint8_t *from, uint64_t bits) {
  (void)bits;
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
AVX2_INLINE __m256 avx2_expand_dense32(const uint8_t *from, uint64_t bits) {
  (void)bits;
  return _mm256_loadu_ps((const float *)from);
}
AVX2_INLINE uint64_t avx2_count(uint64_t bits) { return (uint32_t)__builtin_popcountll(bits); }
AVX2_INLINE __m256 avx2_zero(void) { return _mm256_setzero_ps(); }
AVX2_INLINE __m256 avx2_load(const float *at) { return _mm256_load_ps(at); }
AVX2_INLINE void avx2_store(float *at, __m256 in) { _mm256_store_ps(at, in); }
AVX2_INLINE __m256 avx2_times(__m256 in, float factor) { return _mm256_mul_ps(in, _mm256_set1_ps(factor)); }
AVX2_INLINE __m256 avx2_add(__m256 sums, __m256 weights, __m256 inputs) {
  return _mm256_fmadd_ps(weights, inputs, sums);
}
AVX2_INLINE float avx2_total(__m256 sums) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
AVX2_INLINE void avx2_narrow(const float *in, uint16_t *out) {
  for (int k = 0; k < BLOCK; k += 8)
    _mm_storeu_si128((__m128i *)(out + k), _mm256_cvtps_ph(_mm256_load_ps(in + k), _MM_FROUND_TO_NEAREST_INT));
}
AVX2_INLINE int64_t avx2_widen_halves(const uint8_t *in, int64_t count, float *out) {
  int64_t k = 0;
  for (; k + 8 <= count; k += 8)
    _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(in + 2 * k))));
  return k;
}
AVX2_INLINE __m256 avx2_same(float weight) { return _mm256_set1_ps(weight); }
AVX2_INLINE void avx2_store_anywhere(float *at, __m256 in) { _mm256_storeu_ps(at, in); }
AVX2_INLINE void avx2_transpose(const float *from, int64_t stride, float *to, int64_t to_stride) { /* 8 × 8 */
  __m256 rows[8], pairs[8], fours[8];
  UNROLL for (int k = 0; k < 8; k++) rows[k] = _mm256_loadu_ps(from + k * stride);
  UNROLL for (int k = 0; k < 8; k += 2) {
    pairs[k] = _mm256_unpacklo_ps(rows[k], rows[k + 1]);
    pairs[k + 1] = _mm256_unpackhi_ps(rows[k], rows[k + 1]);
  }
  UNROLL for (int k = 0; k < 8; k += 4) {
    fours[k] = _mm256_shuffle_ps(pairs[k], pairs[k + 2], 0x44);
    fours[k + 1] = _mm256_shuffle_ps(pairs[k], pairs[k + 2], 0xee);
    fours[k + 2] = _mm256_shuffle_ps(pairs[k + 1], pairs[k + 3], 0x44);
    fours[k + 3] = _mm256_shuffle_ps(pairs[k + 1], pairs[k + 3], 0xee);
  }
  UNROLL for (int k = 0; k < 4; k++) {
    _mm256_storeu_ps(to + k * to_stride, _mm256_permute2f128_ps(fours[k], fours[k + 4], 0x20));
    _mm256_storeu_ps(to + (k + 4) * to_stride, _mm256_permute2f128_ps(fours[k], fours[k + 4], 0x31));
  }
}
AVX2_INLINE void avx2_place(uint16_t *to, const uint16_t *ranks, int first, int wide) { /* (first + rank) * wide */
  __m128i columns = _mm_add_epi16(_mm_loadu_si128((const __m128i *)ranks), _mm_set1_epi16((short)first));
  _mm_storeu_si128((__m128i *)to, _mm_mullo_epi16(columns, _mm_set1_epi16((short)wide)));
}
#define avx2_inputs avx2_load
LOOPS(avx2)
#define avx2_bf16_at(from) avx2_expand_dense16(from, avx2_BITS)
#define avx2_half_at(from) avx2_expand_half(from, avx2_BITS)
#define avx2_float_at(from) avx2_expand_dense32(from, avx2_BITS)
#define avx2_int8_at(from) avx2_expand_int8(from, avx2_BITS)
#define avx2_grouped_at avx2_int8_at
MANIES(avx2)

/* --- AVX-512: its expand instructions, 16 columns of float32 at a time */

#ifdef EMULATED_AVX512
#define avx512_TARGET
#define bf16dot_TARGET
#define words_TARGET
#define bytes_TARGET
#define KEEP_IN_REGISTER(in) (void)(in)
#else
#define KEEP_IN_REGISTER(in) __asm__("" : "+v"(in))
#define AVX512_FEATURES "avx2,fma,f16c,popcnt,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl"
#define avx512_TARGET __attribute__((target(AVX512_FEATURES)))
#define bf16dot_TARGET __attribute__((target(AVX512_FEATURES ",avx512vbmi2,avx512bf16")))
#define words_TARGET __attribute__((target(AVX512_FEATURES ",avx512vbmi2")))
#define bytes_TARGET words_TARGET
#endif
#define AVX512_INLINE avx512_TARGET INLINE
typedef __m512 avx512_weights, avx512_sums;
typedef float avx512_input;
enum { avx512_LANES = 16, avx512_WIDE = 8 * 16, avx512_BITS = 0xffff, avx512_SHIFT = 0 };
enum { avx512_ROWS_OF_4 = 4, avx512_ROWS_OF_8 = 2, avx512_FEW = 32 };
#define avx512_UNIT 1.0f
#define avx512_STEPS
#define avx512_UNROLL UNROLL

AVX512_INLINE __m512 avx512_dense16_at(const uint8_t *from) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
AVX512_INLINE __m512 avx512_expand_bf16(const uint8_t *from, uint64_t bits) {
  return _mm512_maskz_expand_ps((__mmask16)bits, avx512_dense16_at(from));
}
AVX512_INLINE __m512 avx512_expand_half(const uint8_t *from, uint64_t bits) {
  __m512 values = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
  return _mm512_maskz_expand_ps((__mmask16)bits, values);
}
AVX512_INLINE __m512 avx512_expand_float(const uint8_t *from, uint64_t bits) {
  return _mm512_maskz_expand_ps((__mmask16)bits, _mm512_loadu_ps(from));
}
AVX512_INLINE __m512 avx512_expand_int8(const uint8_t *from, uint64_t bits) {
  __m512i values = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
  return _mm512_maskz_expand_ps((__mmask16)bits, _mm512_cvtepi32_ps(values));
}
AVX512_INLINE __m512 avx512_expand_grouped(const uint8_t *from, uint64_t bits) {
  return avx512_expand_int8(from, bits);
}
AVX512_INLINE __m512 avx512_expand_dense16(const uint8_t *from, uint64_t bits) {
  (void)bits;
  return avx512_dense16_at(from);
}
AVX512_INLINE __m512 avx512_expand_dense32(const uint8_t *from, uint64_t bits) {
  (void)bits;
  return _mm512_loadu_ps(from);
}
AVX512_INLINE uint64_t avx512_count(uint64_t bits) { return (uint32_t)__builtin_popcountll(bits); }
AVX512_INLINE __m512 avx512_zero(void) { return _mm512_setzero_ps(); }
AVX512_INLINE __m512 avx512_load(const float *at) { return _mm512_loadu_ps(at); }
AVX512_INLINE __m512 avx512_inputs(const float *at) { /* in a register: not read again by the product of each row */
  __m512 in = _mm512_loadu_ps(at);
  KEEP_IN_REGISTER(in);
  return in;
}
AVX512_INLINE void avx512_store(float *at, __m512 in) { _mm512_storeu_ps(at, in); }
AVX512_INLINE __m512 avx512_times(__m512 in, float factor) { return _mm512_mul_ps(in, _mm512_set1_ps(factor)); }
AVX512_INLINE __m512 avx512_add(__m512 sums, __m512 weights, __m512 inputs) {
  return _mm512_fmadd_ps(weights, inputs, sums);
}
AVX512_INLINE float avx512_total(__m512 sums) {
  __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sums), 1));
  return avx2_total(_mm256_add_ps(_mm512_castps512_ps256(sums), high));
}
AVX512_INLINE void avx512_narrow(const float *in, uint16_t *out) { avx2_narrow(in, out); }
AVX512_INLINE int64_t avx512_widen_halves(const uint8_t *in, int64_t count, float *out) {
  return avx2_widen_halves(in, count, out);
}
AVX512_INLINE __m512 avx512_same(float weight) { return _mm512_set1_ps(weight); }
AVX512_INLINE void avx512_store_anywhere(float *at, __m512 in) { _mm512_storeu_ps(at, in); }
AVX512_INLINE void avx512_transpose(const float *from, int64_t stride, float *to, int64_t to_stride) {
  avx2_transpose(from, stride, to, to_stride);
}
AVX512_INLINE void avx512_place(uint16_t *to, const uint16_t *ranks, int first, int wide) {
  avx2_place(to, ranks, first, wide);
}
LOOPS(avx512)
#define avx512_bf16_at(from) avx512_expand_dense16(from, avx512_BITS)
#define avx512_half_at(from) avx512_expand_half(from, avx512_BITS)
#define avx512_float_at(from) avx512_expand_dense32(from, avx512_BITS)
#define avx512_int8_at(from) avx512_expand_int8(from, avx512_BITS)
#define avx512_grouped_at avx512_int8_at
MANIES(avx512)

/* --- AVX-512 with VBMI2 and BF16: 32 columns at a time where weights and x are bfloat16. The products are exact, the
   sums float32; numbers below 2^-126 count as zero. */

typedef __m512i bf16dot_weights;
typedef __m512 bf16dot_sums;
typedef uint16_t bf16dot_input;
#define BF16DOT_INLINE bf16dot_TARGET INLINE
enum { bf16dot_LANES = 32, bf16dot_SHIFT = 0, bf16dot_ROWS_OF_4 = 4, bf16dot_ROWS_OF_8 = 2 };
#define bf16dot_BITS 0xffffffffu
#define bf16dot_UNIT 1.0f
#define bf16dot_STEPS UNROLL
#define bf16dot_UNROLL UNROLL

BF16DOT_INLINE __m512i bf16dot_expand_bf16(const uint8_t *from, uint64_t bits) {
  return _mm512_maskz_expand_epi16((__mmask32)bits, _mm512_loadu_si512(from));
}
BF16DOT_INLINE __m512i bf16dot_expand_dense16(const uint8_t *from, uint64_t bits) {
  (void)bits;
  return _mm512_loadu_si512(from);
}
#define bf16dot_count avx512_count
#define bf16dot_zero avx512_zero
#define bf16dot_total avx512_total
BF16DOT_INLINE __m512i bf16dot_inputs(const uint16_t *at) {
  __m512i in = _mm512_loadu_si512(at);
  KEEP_IN_REGISTER(in);
  return in;
}
BF16DOT_INLINE __m512i bf16dot_times(__m512i in, float factor) { /* no type with scales is here */
  (void)factor;
  return in;
}
BF16DOT_INLINE __m512 bf16dot_add(__m512 sums, __m512i weights, __m512i inputs) {
  return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)inputs);
}
PRODUCTS(bf16dot, bf16)
PRODUCTS(bf16dot, dense16)

/* --- AVX-512 with VBMI2: 32 columns of bfloat16 at a time, split to the float32 of the even and of the odd ones. */

typedef struct {
  __m512 part[2];
} words_weights;
typedef __m512 words_sums;
typedef float words_input;
#define WORDS_INLINE words_TARGET INLINE
enum { words_LANES = 32, words_SHIFT = 0, words_ROWS_OF_4 = 4, words_ROWS_OF_8 = 2 };
#define words_BITS 0xffffffffu
#define words_UNIT 1.0f
#define words_STEPS UNROLL
#define words_UNROLL UNROLL

WORDS_INLINE words_weights words_split(__m512i in) {
  return (words_weights){{_mm512_castsi512_ps(_mm512_slli_epi32(in, 16)),
                          _mm512_castsi512_ps(_mm512_and_si512(in, _mm512_set1_epi32((int)0xffff0000)))}};
}
WORDS_INLINE words_weights words_expand_bf16(const uint8_t *from, uint64_t bits) {
  return words_split(_mm512_maskz_expand_epi16((__mmask32)bits, _mm512_loadu_si512(from)));
}
WORDS_INLINE words_weights words_expand_dense16(const uint8_t *from, uint64_t bits) {
  (void)bits;
  return words_split(_mm512_loadu_si512(from));
}
#define words_count avx512_count
#define words_zero avx512_zero
#define words_total avx512_total
WORDS_INLINE words_weights words_inputs(const float *at) {
  return (words_weights){{avx512_inputs(at), avx512_inputs(at + 16)}};
}
WORDS_INLINE words_weights words_times(words_weights in, float factor) { /* no type with scales is here */
  (void)factor;
  return in;
}
WORDS_INLINE __m512 words_add(__m512 sums, words_weights weights, words_weights inputs) {
  UNROLL for (int k = 0; k < 2; k++) sums = _mm512_fmadd_ps(weights.part[k], inputs.part[k], sums);
  return sums;
}
PRODUCTS(words, bf16)
PRODUCTS(words, dense16)

/* The same for 64 columns of int8, split to four: value * 2^24. */
typedef struct {
  __m512 part[4];
} bytes_weights;
typedef __m512 bytes_sums;
typedef float bytes_input;
enum { bytes_LANES = 64, bytes_SHIFT = 0, bytes_ROWS_OF_4 = 2, bytes_ROWS_OF_8 = 2 };
#define bytes_BITS UINT64_MAX
#define bytes_UNIT 0x1p-24f
#define bytes_STEPS
#define bytes_UNROLL UNROLL

WORDS_INLINE bytes_weights bytes_expand_int8(const uint8_t *from, uint64_t bits) {
  const __m512i in = _mm512_maskz_expand_epi8((__mmask64)bits, _mm512_loadu_si512(from));
  const __m512i highest = _mm512_set1_epi32((int)0xff000000);
  return (bytes_weights){{_mm512_cvtepi32_ps(_mm512_slli_epi32(in, 24)),
                          _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_slli_epi32(in, 16), highest)),
                          _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_slli_epi32(in, 8), highest)),
                          _mm512_cvtepi32_ps(_mm512_and_si512(in, highest))}};
}
#define bytes_expand_grouped bytes_expand_int8
#define bytes_count avx512_count
#define bytes_zero avx512_zero
#define bytes_total avx512_total
WORDS_INLINE bytes_weights bytes_inputs(const float *at) {
  return (bytes_weights){{avx512_inputs(at), avx512_inputs(at + 16), avx512_inputs(at + 32), avx512_inputs(at + 48)}};
}
WORDS_INLINE bytes_weights bytes_times(bytes_weights in, float factor) {
  UNROLL for (int k = 0; k < 4; k++) in.part[k] = _mm512_mul_ps(in.part[k], _mm512_set1_ps(factor));
  return in;
}
WORDS_INLINE __m512 bytes_add(__m512 sums, bytes_weights weights, bytes_weights inputs) {
  UNROLL for (int k = 0; k < 4; k++) sums = _mm512_fmadd_ps(weights.part[k], inputs.part[k], sums);
  return sums;
}
PRODUCTS(bytes, int8)
PRODUCTS(bytes, grouped)

WORDS_INLINE void words_separate(__m512 low, __m512 high, float *evens, float *odds) { /* the numbers of two vectors */
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  _mm512_store_ps(evens, _mm512_permutex2var_ps(low, even, high));
  _mm512_store_ps(odds, _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high));
}

/* Sorts each 32 columns of a line: the even ones, then the odd ones. */
words_TARGET static void words_sort(float *line, int64_t width) {
  for (float *at = line; at < line + width; at += 32)
    words_separate(_mm512_load_ps(at), _mm512_load_ps(at + 16), at, at + 16);
}

/* Sorts each BLOCK of a line: its columns 0, 4, 8 …, then 1, 5, 9 …, 2 … and 3 … */
words_TARGET static void bytes_sort(float *line, int64_t width) {
  words_sort(line, width);
  for (float *at = line; at < line + width; at += BLOCK) {
    const __m512 odds = _mm512_load_ps(at + 16), more_odds = _mm512_load_ps(at + 48);
    words_separate(_mm512_load_ps(at), _mm512_load_ps(at + 32), at, at + 32);
    words_separate(odds, more_odds, at + 16, at + 48);
  }
}

#include "kernel_codes.h"
#if defined(WITH_AMX)
#include "kernel_amx.h"
#endif

#elif defined(__aarch64__)

/* --- NEON: the same shuffles as AVX2, two vectors of 4 floats at a time */

#define neon_TARGET
typedef float32x4x2_t neon_weights, neon_sums;
typedef float neon_input;
enum { neon_LANES = 8, neon_WIDE = 8 * 8, neon_BITS = 0xff << 5, neon_SHIFT = 5 };
enum { neon_ROWS_OF_4 = 2, neon_ROWS_OF_8 = 1 };
#define neon_UNIT 1.0f
#define neon_STEPS
#define neon_UNROLL UNROLL

INLINE neon_weights neon_pair(float32x4_t low, float32x4_t high) { return (neon_weights){{low, high}}; }
INLINE neon_weights neon_expand_bf16(const uint8_t *from, uint64_t bits) {
  uint8x16_t values = vld1q_u8(from);
  uint8x16_t low = vqtbl1q_u8(values, vld1q_u8(tables.bf16 + bits));
  uint8x16_t high = vqtbl1q_u8(values, vld1q_u8(tables.bf16 + bits + 16));
  return neon_pair(vreinterpretq_f32_u8(low), vreinterpretq_f32_u8(high));
}
INLINE neon_weights neon_of_halves(uint8x16_t in) {
  float16x8_t halves = vreinterpretq_f16_u8(in);
  return neon_pair(vcvt_f32_f16(vget_low_f16(halves)), vcvt_f32_f16(vget_high_f16(halves)));
}
INLINE neon_weights neon_expand_half(const uint8_t *from, uint64_t bits) {
  return neon_of_halves(vqtbl1q_u8(vld1q_u8(from), vld1q_u8(tables.half + bits)));
}
INLINE neon_weights neon_expand_float(const uint8_t *from, uint64_t bits) {
  uint8x16x2_t values = {{vld1q_u8(from), vld1q_u8(from + 16)}};
  uint8x16_t low = vqtbl2q_u8(values, vld1q_u8(tables.bytes + bits));
  uint8x16_t high = vqtbl2q_u8(values, vld1q_u8(tables.bytes + bits + 16));
  return neon_pair(vreinterpretq_f32_u8(low), vreinterpretq_f32_u8(high));
}
INLINE neon_weights neon_expand_int8(const uint8_t *from, uint64_t bits) {
  uint8x8_t eight = vld1_u8(from);
  uint8x16_t values = vcombine_u8(eight, eight);
  int32x4_t low = vreinterpretq_s32_u8(vqtbl1q_u8(values, vld1q_u8(tables.int8 + bits)));
  int32x4_t high = vreinterpretq_s32_u8(vqtbl1q_u8(values, vld1q_u8(tables.int8 + bits + 16)));
  return neon_pair(vcvtq_n_f32_s32(low, 24), vcvtq_n_f32_s32(high, 24)); /* times 2^-24 */
}
INLINE neon_weights neon_expand_grouped(const uint8_t *from, uint64_t bits) { return neon_expand_int8(from, bits); }
INLINE neon_weights neon_expand_dense16(const uint8_t *from, uint64_t bits) {
  (void)bits;
  uint16x8_t values = vreinterpretq_u16_u8(vld1q_u8(from));
  uint32x4_t low = vshll_n_u16(vget_low_u16(values), 16), high = vshll_n_u16(vget_high_u16(values), 16);
  return neon_pair(vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high));
}
INLINE neon_weights neon_expand_dense32(const uint8_t *from, uint64_t bits) {
  (void)bits;
  return neon_pair(vreinterpretq_f32_u8(vld1q_u8(from)), vreinterpretq_f32_u8(vld1q_u8(from + 16)));
}
INLINE uint64_t neon_count(uint64_t bits) { return tables.counts[bits >> 5]; }
INLINE neon_sums neon_zero(void) { return neon_pair(vdupq_n_f32(0), vdupq_n_f32(0)); }
INLINE neon_weights neon_load(const float *at) { return neon_pair(vld1q_f32(at), vld1q_f32(at + 4)); }
INLINE void neon_store(float *at, neon_weights in) {
  vst1q_f32(at, in.val[0]);
  vst1q_f32(at + 4, in.val[1]);
}
INLINE neon_weights neon_times(neon_weights in, float factor) {
  return neon_pair(vmulq_n_f32(in.val[0], factor), vmulq_n_f32(in.val[1], factor));
}
INLINE neon_sums neon_add(neon_sums sums, neon_weights weights, neon_weights inputs) {
  return neon_pair(vfmaq_f32(sums.val[0], weights.val[0], inputs.val[0]),
                   vfmaq_f32(sums.val[1], weights.val[1], inputs.val[1]));
}
INLINE float neon_total(neon_sums sums) { return vaddvq_f32(vaddq_f32(sums.val[0], sums.val[1])); }
INLINE void neon_narrow(const float *in, uint16_t *out) {
  for (int k = 0; k < BLOCK; k += 4) vst1_u16(out + k, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(in + k))));
}
INLINE int64_t neon_widen_halves(const uint8_t *in, int64_t count, float *out) {
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) neon_store(out + k, neon_of_halves(vld1q_u8(in + 2 * k)));
  return k;
}
INLINE neon_weights neon_same(float weight) { return neon_pair(vdupq_n_f32(weight), vdupq_n_f32(weight)); }
INLINE void neon_store_anywhere(float *at, neon_weights in) { neon_store(at, in); }
INLINE void neon_transpose(const float *from, int64_t stride, float *to, int64_t to_stride) { /* 8 × 8, 4 × 4 each */
  for (int row = 0; row < 8; row += 4) {
    for (int column = 0; column < 8; column += 4) {
      const float *at = from + row * stride + column;
      float *out = to + column * to_stride + row;
      float32x4x2_t low = vtrnq_f32(vld1q_f32(at), vld1q_f32(at + stride));
      float32x4x2_t high = vtrnq_f32(vld1q_f32(at + 2 * stride), vld1q_f32(at + 3 * stride));
      for (int k = 0; k < 2; k++) {
        vst1q_f32(out + k * to_stride, vcombine_f32(vget_low_f32(low.val[k]), vget_low_f32(high.val[k])));
        vst1q_f32(out + (k + 2) * to_stride, vcombine_f32(vget_high_f32(low.val[k]), vget_high_f32(high.val[k])));
      }
    }
  }
}
INLINE void neon_place(uint16_t *to, const uint16_t *ranks, int first, int wide) {
  vst1q_u16(to, vmulq_n_u16(vaddq_u16(vld1q_u16(ranks), vdupq_n_u16((uint16_t)first)), (uint16_t)wide));
}
#define neon_inputs neon_load
LOOPS(neon)
#define neon_bf16_at(from) neon_expand_dense16(from, neon_BITS)
#define neon_half_at(from) neon_expand_half(from, neon_BITS)
#define neon_float_at(from) neon_expand_dense32(from, neon_BITS)
#define neon_int8_at(from) neon_expand_int8(from, neon_BITS)
#define neon_grouped_at neon_int8_at
MANIES(neon)

#endif

/* --- calls */

static const uint8_t SIZES[TYPES] = {[BF16] = 2, [HALF] = 2, [FLOAT] = 4, [INT8] = 1, [GROUPED_INT8] = 1,
                                     [DENSE_BF16] = 2, [DENSE_FLOAT] = 4};
#define FOR_TOKENS(ISA, TYPE) {ISA##_##TYPE##_1, ISA##_##TYPE##_2, ISA##_##TYPE##_4, ISA##_##TYPE##_8}
#define FOR_TYPES(ISA)                                                                                                \
  {                                                                                                                   \
    [BF16] = FOR_TOKENS(ISA, bf16), [HALF] = FOR_TOKENS(ISA, half), [FLOAT] = FOR_TOKENS(ISA, float),                 \
    [INT8] = FOR_TOKENS(ISA, int8), [GROUPED_INT8] = FOR_TOKENS(ISA, grouped),                                        \
    [DENSE_BF16] = FOR_TOKENS(ISA, dense16), [DENSE_FLOAT] = FOR_TOKENS(ISA, dense32)                                 \
  }
#define UNPACKING(ISA)                                                                                                \
  {                                                                                                                   \
    [BF16] = ISA##_unpack_bf16, [HALF] = ISA##_unpack_half, [FLOAT] = ISA##_unpack_float,                             \
    [INT8] = ISA##_unpack_int8, [GROUPED_INT8] = ISA##_unpack_int8                                                    \
  }

#define FOR_MANY(ISA)                                                                                                 \
  {                                                                                                                   \
    [BF16] = ISA##_many_bf16, [HALF] = ISA##_many_half, [FLOAT] = ISA##_many_float, [INT8] = ISA##_many_int8,         \
    [GROUPED_INT8] = ISA##_many_grouped                                                                               \
  }

#define WITH_VBMI2                                                                                                    \
  {                                                                                                                   \
    {[BF16] = FOR_TOKENS(words, bf16), [HALF] = FOR_TOKENS(avx512, half), [FLOAT] = FOR_TOKENS(avx512, float),        \
     [INT8] = FOR_TOKENS(bytes, int8), [GROUPED_INT8] = FOR_TOKENS(bytes, grouped),                                   \
     [DENSE_BF16] = FOR_TOKENS(words, dense16), [DENSE_FLOAT] = FOR_TOKENS(avx512, dense32)},                         \
        UNPACKING(avx512), avx512_widen, FOR_MANY(avx512), avx512_tiles, avx512_WIDE, avx512_FEW,                     \
    {                                                                                                                 \
      [BF16] = words_sort, [INT8] = bytes_sort, [GROUPED_INT8] = bytes_sort, [DENSE_BF16] = words_sort                \
    }                                                                                                                 \
  }

static const struct {
  loop product[TYPES][4], unpack[TYPES];
  void (*widen)(const uint8_t *, int32_t, int64_t, float *);
  loop many[TYPES], tiles;
  int64_t wide; /* tokens of a tile */
  int64_t few;  /* tokens up to which the loop of up to MOST_TOKENS, as often as needed, is faster */
  void (*sort[TYPES])(float *, int64_t); /* columns of x, or NULL: they stay as they are */
} variants[ISAS] = {
    [PORTABLE] = {FOR_TYPES(portable), UNPACKING(portable), portable_widen, {0}, NULL, 0},
#if defined(__x86_64__)
    [AVX2] = {FOR_TYPES(avx2), UNPACKING(avx2), avx2_widen, FOR_MANY(avx2), avx2_tiles, avx2_WIDE},
    [AVX512] = {FOR_TYPES(avx512), UNPACKING(avx512), avx512_widen, FOR_MANY(avx512), avx512_tiles,
                avx512_WIDE, avx512_FEW},
    [AVX512_BF16] = WITH_VBMI2, /* but for `dots` */
    [AVX512_VBMI2] = WITH_VBMI2,
#if defined(WITH_AMX)
    [AMX] = WITH_VBMI2, /* but for bfloat16 by `amx_product` */
#endif
#elif defined(__aarch64__)
    [NEON] = {FOR_TYPES(neon), UNPACKING(neon), neon_widen, FOR_MANY(neon), neon_tiles, neon_WIDE},
#endif
};

#if defined(__x86_64__)
static const loop dots[2][4] = {FOR_TOKENS(bf16dot, bf16), FOR_TOKENS(bf16dot, dense16)};
#endif

/* Rows that a thread takes at a time, a multiple of `unit`: several times, so that a slow thread takes fewer. */
INLINE int64_t chunk_of(int64_t rows, int64_t unit, int64_t threads) {
  enum { SHARES = 4 }; /* chunks per thread */
  return (rows / (SHARES * threads) + unit) / unit * unit;
}

/* The next chunk of the rows up to `end`; 0 if there are none left. */
INLINE int take(_Atomic int64_t *next, int64_t end, int64_t chunk, int64_t *first, int64_t *last) {
  *first = atomic_fetch_add(next, chunk);
  *last = *first + chunk < end ? *first + chunk : end;
  return *first < end;
}

static void work(void *data) { /* takes chunks of rows until there are none */
  struct job *job = data;
  for (int64_t first, last; take(&job->next, job->last, job->chunk, &first, &last);) job->loop(job, first, last);
}

/* Runs the job's loop over all rows: in chunks of a multiple of `unit` rows, at most `most`. */
static void run(struct job *job, int64_t unit, int64_t most, int64_t work_to_do, int32_t threads) {
  const struct matrix *matrix = job->matrix;
  int64_t rows = job->last - job->first;
  if (threads <= 1 || matrix->parallel == NULL || rows <= unit || work_to_do <= matrix->alone) {
    job->loop(job, job->first, job->last);
    return;
  }
  job->chunk = chunk_of(rows, unit, threads);
  if (job->chunk > most) job->chunk = most;
  atomic_init(&job->next, job->first);
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  memcpy(&parallel, &matrix->parallel, sizeof parallel);
  parallel(work, job, (unsigned)threads, 0);
}

static int wrong(const struct matrix *matrix) {
  return matrix->isa < 0 || matrix->isa >= ISAS || variants[matrix->isa].widen == NULL || matrix->type < 0 ||
         matrix->type >= TYPES || matrix->rows < 0 || matrix->columns < 0 || matrix->count < 0 || matrix->groups < 1;
}

static size_t tail_size(const struct matrix *matrix) {
  return 2 * (size_t)(matrix->columns + BLOCK) * SIZES[matrix->type];
}

/* The tail: as many values as a row reads at most, then as many zeros. A row that begins in it ends in it. */
static void write_tail(struct job *job, uint8_t *tail) {
  const struct matrix *matrix = job->matrix;
  const int64_t most = matrix->columns + BLOCK, length = matrix->count < most ? matrix->count : most;
  const size_t size = SIZES[matrix->type], filled = (size_t)length * size;
  job->tail = tail, job->tail_at = (uint64_t)(matrix->count - length);
  if (filled > 0) memcpy(tail, matrix->values + job->tail_at * size, filled);
  memset(tail + filled, 0, tail_size(matrix) - filled);
}

static int wrong_product(const struct matrix *matrix, int32_t type, int32_t tokens) {
  if (wrong(matrix) || type < BF16 || type > FLOAT || tokens < 0 || tokens > MOST_TOKENS) return 1;
  return matrix->type >= DENSE_BF16 && matrix->columns % BLOCK; /* rows have no zeros after them */
}

INLINE int which_loop(int32_t tokens) { return tokens > 4 ? 3 : tokens > 2 ? 2 : tokens - 1; } /* of 1, 2, 4, 8 */

/* Bytes that `prepare` takes for as many tokens, which may be fewer than the loop has. */
static size_t prepared_size(const struct matrix *matrix, int32_t tokens) {
  const size_t width = (size_t)(matrix->columns + BLOCK - 1) / BLOCK * BLOCK;
  return (width * sizeof(float) << which_loop(tokens)) + tail_size(matrix) + 64;
}

/* Makes x [tokens, C] of `type` ready for the loop of a product, of which `first`, `last` and `y` are left. */
static struct job prepare(const struct matrix *matrix, const uint8_t *x, int32_t type, int32_t tokens,
                          uint8_t *memory) {
  const int64_t columns = matrix->columns, width = (columns + BLOCK - 1) / BLOCK * BLOCK;
  const int which = which_loop(tokens), padded = 1 << which;
  int32_t isa = matrix->isa, dot = 0;
  const int vbmi2 = isa == AVX512_VBMI2 || isa == AVX512_BF16 || isa == AMX;
  if (vbmi2 && matrix->type == GROUPED_INT8 && columns / matrix->groups % BLOCK) isa = AVX512;
  loop chosen = variants[isa].product[matrix->type][which];
#if defined(__x86_64__)
  dot = matrix->isa == AVX512_BF16 && type == BF16 && (matrix->type == BF16 || matrix->type == DENSE_BF16);
  if (dot) chosen = dots[matrix->type == DENSE_BF16][which];
#endif
  const size_t size = dot ? 2 : 4, line = (size_t)width * size;
  uint8_t *inputs = memory + (64 - (uintptr_t)memory % 64) % 64;
  for (int t = 0; t < padded; t++) {
    uint8_t *to = inputs + (size_t)t * line;
    size_t filled = t < tokens ? (size_t)columns * size : 0;
    const uint8_t *from = x + (int64_t)(t < tokens ? t : 0) * columns * size_of(type);
    if (filled > 0 && dot)
      memcpy(to, from, filled);
    else if (filled > 0)
      variants[isa].widen(from, type, columns, (float *)(void *)to);
    memset(to + filled, 0, line - filled);
    if (!dot && variants[isa].sort[matrix->type]) variants[isa].sort[matrix->type]((float *)(void *)to, width);
  }
  struct job job = {.matrix = matrix, .x = inputs, .width = width, .tokens = tokens, .y_type = type, .loop = chosen};
  write_tail(&job, inputs + (size_t)padded * line);
  return job;
}

/* Multiplies, if x is finite, by all rows of the weight. */
static int32_t multiply(struct job *job, uint8_t *y, int32_t threads) {
  const struct matrix *matrix = job->matrix;
  if (atomic_load(&job->not_finite)) return NOT_FINITE;
  job->y = y, job->first = 0, job->last = matrix->rows;
  run(job, 4, INT64_MAX, matrix->rows * matrix->columns << which_loop((int32_t)job->tokens), threads);
  return FINE;
}

/* y [tokens, R] = x [tokens, C] times the weight's transpose, plus the bias; up to 8 tokens. `type` of x and y: BF16,
   HALF or FLOAT. */
int32_t atp_product(const struct matrix *matrix, const uint8_t *x, int32_t type, int32_t tokens, uint8_t *y,
                    int32_t threads) {
  if (wrong_product(matrix, type, tokens)) return WRONG_ARGUMENT;
  if (tokens == 0 || matrix->rows == 0) return FINE;
  uint8_t *memory = malloc(prepared_size(matrix, tokens));
  if (memory == NULL) return NO_MEMORY;
  struct job job = prepare(matrix, x, type, tokens, memory);
  multiply(&job, y, threads);
  free(memory);
  return FINE;
}

/* The same for any number of tokens. Of more than `few`: NOT_FINITE, with y undefined, if an x is infinite or no
   number, since zeros of the weight are left out. WRONG_ARGUMENT if the instruction set has no such loop. */
int32_t atp_product_of_many(const struct matrix *matrix, const uint8_t *x, int32_t type, int64_t tokens, uint8_t *y,
                            int32_t threads) {
  if (wrong(matrix) || type < BF16 || type > FLOAT || tokens < 0 || variants[matrix->isa].many[matrix->type] == NULL)
    return WRONG_ARGUMENT;
  if (tokens == 0 || matrix->rows == 0) return FINE;
#if defined(WITH_AMX)
  if (matrix->isa == AMX && type == BF16 && matrix->type != HALF && matrix->type != FLOAT)
    return amx_product(matrix, x, tokens, y, threads);
#endif
  const int64_t columns = matrix->columns, wide = variants[matrix->isa].wide, size = size_of(type);
  if (tokens <= variants[matrix->isa].few) {
    for (int64_t start = 0; start < tokens; start += MOST_TOKENS) {
      const int64_t together = tokens - start < MOST_TOKENS ? tokens - start : MOST_TOKENS;
      const int32_t error = atp_product(matrix, x + start * columns * size, type, (int32_t)together,
                                        y + start * matrix->rows * size, threads);
      if (error != FINE) return error;
    }
    return FINE;
  }
  const int64_t groups = (tokens + MANY - 1) / MANY, most = ((tokens + groups - 1) / groups + wide - 1) / wide * wide;
  uint8_t *memory = malloc((size_t)(columns * most) * sizeof(float) + 64);
  if (memory == NULL) return NO_MEMORY;
  int32_t error = FINE;
  for (int64_t start = 0; start < tokens && error == FINE; start += most) {
    struct job job = {.matrix = matrix, .x = x + start * columns * size, .y = y + start * matrix->rows * size,
                      .y_type = type, .tokens = tokens - start < most ? tokens - start : most,
                      .panels = (float *)(void *)(memory + (64 - (uintptr_t)memory % 64) % 64)};
    job.loop = variants[matrix->isa].tiles, job.first = 0, job.last = columns;
    run(&job, BLOCK, INT64_MAX, columns * job.tokens, threads);
    job.loop = variants[matrix->isa].many[matrix->type], job.last = matrix->rows;
    if (atomic_load(&job.not_finite))
      error = NOT_FINITE;
    else
      run(&job, 8, TOGETHER, matrix->rows * columns * job.tokens, threads);
  }
  free(memory);
  return error;
}

/* Rows `first` to `last` of the weight with its zeros, [last - first, C] of `type`: BF16, HALF or FLOAT. */
int32_t atp_unpack(const struct matrix *matrix, int64_t first, int64_t last, uint8_t *out, int32_t type,
                   int32_t threads) {
  if (wrong(matrix) || type < BF16 || type > FLOAT || first < 0 || last > matrix->rows || first > last)
    return WRONG_ARGUMENT;
  loop chosen = variants[matrix->isa].unpack[matrix->type];
  if (chosen == NULL) return WRONG_ARGUMENT;
  struct job job = {.matrix = matrix, .y = out, .y_type = type, .loop = chosen, .first = first, .last = last};
  run(&job, 4, INT64_MAX, (last - first) * matrix->columns, threads);
  return FINE;
}

#if defined(__x86_64__)
static size_t codes_tail_size(const struct matrix *matrix) { /* of a row and a vector after it, then as many zeros */
  return 2 * (size_t)(matrix->columns * matrix->bits / 8 + 2 * BLOCK);
}

static void codes_write_tail(struct job *job, uint8_t *tail) {
  const struct matrix *matrix = job->matrix;
  const int64_t size = (int64_t)codes_tail_size(matrix), length = matrix->count < size / 2 ? matrix->count : size / 2;
  job->tail = tail, job->tail_at = (uint64_t)(matrix->count - length);
  if (length > 0) memcpy(tail, matrix->values + job->tail_at, (size_t)length);
  memset(tail + length, 0, (size_t)(size - length));
}

static int wrong_codes(const struct matrix *matrix, int32_t type) {
  return type < BF16 || type > FLOAT || matrix->rows < 0 || matrix->columns < 0 || matrix->columns % BLOCK ||
         matrix->count < 0 || matrix->bits < 2 || matrix->bits > 8 ||
         (matrix->isa != AVX512_VBMI2 && matrix->isa != AVX2);
}

/* `prepared_size` and `prepare` for a weight of codes: x is rounded to 16 bits. */
static size_t codes_prepared_size(const struct matrix *matrix, int32_t tokens) {
  const size_t columns = (size_t)matrix->columns, padded = (size_t)1 << which_loop(tokens);
  const size_t of_tokens = padded * (2 * columns + 2 * columns / BLOCK * sizeof(float));
  return 64 + sizeof(struct rounded) + columns * sizeof(float) + of_tokens + codes_tail_size(matrix);
}

static struct job codes_prepare(const struct matrix *matrix, const uint8_t *x, int32_t type, int32_t tokens,
                                uint8_t *memory) {
  const int64_t columns = matrix->columns, blocks = columns / BLOCK;
  const int which = which_loop(tokens), padded = 1 << which;
  float *floats = (float *)(void *)(memory + (64 - (uintptr_t)memory % 64) % 64);
  int8_t *high = (int8_t *)(floats + columns), *low = high + padded * columns;
  float *scales = (float *)(void *)(low + padded * columns), *sums = scales + padded * blocks;
  struct rounded *rounded = (struct rounded *)(void *)(sums + padded * blocks);
  int16_t *whole = (int16_t *)(void *)high;
  *rounded = (struct rounded){.whole = whole, .high = high, .low = low, .scales = scales, .sums = sums};
  const int narrow = matrix->isa == AVX2;
  struct job job = {.matrix = matrix, .x = rounded, .tokens = tokens, .y_type = type,
                    .loop = code_products[narrow][which]};
  int finite = 1;
  for (int t = 0; t < padded; t++) {
    if (t < tokens)
      variants[narrow ? AVX2 : AVX512].widen(x + t * columns * size_of(type), type, columns, floats);
    else
      memset(floats, 0, (size_t)columns * sizeof(float));
    const int64_t to = t * columns, of_block = t * blocks;
    if (narrow)
      finite &= avx2_codes_round(floats, columns, whole + to, scales + of_block, sums + of_block);
    else
      finite &= codes_round(floats, columns, high + to, low + to, scales + of_block, sums + of_block);
  }
  atomic_init(&job.not_finite, !finite);
  codes_write_tail(&job, (uint8_t *)(rounded + 1));
  return job;
}
#endif

/* y [tokens, R] = x [tokens, C], rounded to 16 bits, times the transpose of a weight of codes, plus the bias; up to 8
   tokens. NOT_FINITE, with y undefined, if an x is infinite or no number. The instruction set is AVX512_VBMI2, here with
   VBMI and VNNI, or AVX2. */
int32_t atp_codes_product(const struct matrix *matrix, const uint8_t *x, int32_t type, int32_t tokens, uint8_t *y,
                          int32_t threads) {
#if defined(__x86_64__)
  if (wrong_codes(matrix, type) || tokens < 0 || tokens > MOST_TOKENS) return WRONG_ARGUMENT;
  if (tokens == 0 || matrix->rows == 0) return FINE;
  uint8_t *memory = malloc(codes_prepared_size(matrix, tokens));
  if (memory == NULL) return NO_MEMORY;
  struct job job = codes_prepare(matrix, x, type, tokens, memory);
  const int32_t error = multiply(&job, y, threads);
  free(memory);
  return error;
#else
  (void)matrix, (void)x, (void)type, (void)tokens, (void)y, (void)threads;
  return WRONG_ARGUMENT;
#endif
}

/* Rows `first` to `last` of a weight of codes, [last - first, C] of `type`: BF16, HALF or FLOAT. */
int32_t atp_codes_unpack(const struct matrix *matrix, int64_t first, int64_t last, uint8_t *out, int32_t type,
                         int32_t threads) {
#if defined(__x86_64__)
  if (wrong_codes(matrix, type) || first < 0 || last > matrix->rows || first > last) return WRONG_ARGUMENT;
  struct job job = {.matrix = matrix, .y = out, .y_type = type, .loop = code_unpacks[matrix->isa == AVX2],
                    .first = first, .last = last};
  uint8_t *tail = malloc(codes_tail_size(matrix));
  if (tail == NULL) return NO_MEMORY;
  codes_write_tail(&job, tail);
  run(&job, 4, INT64_MAX, (last - first) * matrix->columns, threads);
  free(tail);
  return FINE;
#else
  (void)matrix, (void)first, (void)last, (void)out, (void)type, (void)threads;
  return WRONG_ARGUMENT;
#endif
}

#include "kernel_decoder.h"

/* Fills offsets [R + 1] with the sums of the bits of the rows before; the first row with a bit after its last column,
   or -1. */
int64_t atp_offsets(const uint8_t *bitmask, int64_t rows, int64_t columns, int64_t *offsets) {
  int64_t stride = (columns + 7) / 8, sum = 0;
  int after = (int)(columns % 8);
  for (int64_t row = 0; row < rows; row++) {
    const uint8_t *at = bitmask + row * stride;
    offsets[row] = sum;
    for (int64_t byte = 0; byte < stride; byte += 8) sum += __builtin_popcountll(load_mask(at + byte, stride - byte));
    if (after && at[stride - 1] >> after) return row;
  }
  offsets[rows] = sum;
  return -1;
}
