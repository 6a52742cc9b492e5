/* For an emulator of another CPU: NEON's loops against the portable ones. Prints "done". */

#include <stdio.h>

#include "../atp_tune/packed/kernel.c"

static uint64_t state = 1;

static uint32_t drawn(void) { /* a linear congruence */
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(state >> 33);
}

static float number(void) { return (float)(int32_t)(drawn() % 2001 - 1000) / 256; }

static void fill(uint8_t *at, int32_t type, int64_t count) {
  for (int64_t k = 0; k < count; k++)
    if (type >= INT8)
      at[k] = (uint8_t)drawn();
    else
      store_number(number(), at, type, k);
}

static int failed(const char *what) {
  puts(what);
  return 1;
}

static int apart(const uint8_t *one, const uint8_t *other, int32_t kind, int type, int64_t columns, int64_t count) {
  for (int64_t k = 0; k < count; k++) {
    float left = load_number(one, kind, k), right = load_number(other, kind, k), between = left - right;
    float size_of_sum = (left < 0 ? -left : left) + (float)columns * (type >= INT8 ? 1000 : 16);
    float bound = size_of_sum * (kind == FLOAT ? 0x1p-21f : kind == HALF ? 0x1p-10f : 0x1p-7f);
    if (!((between < 0 ? -between : between) <= bound) && left != right) return 1;
  }
  return 0;
}

/* Many tokens, against the portable loops for eight at a time. */
static int compared_many(struct matrix *matrix, const uint8_t *x, int32_t kind, int64_t tokens) {
  int64_t size = size_of(kind), rows = matrix->rows, columns = matrix->columns;
  uint8_t *expected = malloc((size_t)(tokens * rows * size)), *found = malloc((size_t)(tokens * rows * size));
  matrix->isa = PORTABLE;
  for (int64_t first = 0; first < tokens; first += MOST_TOKENS) {
    int32_t some = (int32_t)(tokens - first < MOST_TOKENS ? tokens - first : MOST_TOKENS);
    atp_product(matrix, x + first * columns * size, kind, some, expected + first * rows * size, 1);
  }
  matrix->isa = NEON;
  if (atp_product_of_many(matrix, x, kind, tokens, found, 1) != FINE) return failed("error of many");
  int wrong = apart(expected, found, kind, matrix->type, columns, tokens * rows);
  free(expected), free(found);
  return wrong ? failed("product of many") : 0;
}

static int compared(int type, int64_t rows, int64_t columns, int density, int shift) {
  int64_t stride = (columns + 7) / 8, count, groups = type == GROUPED_INT8 ? 2 : 1;
  int64_t size = type >= INT8 ? 1 : size_of(type);
  uint8_t *bitmask = calloc((size_t)(rows * stride), 1);
  int64_t *offsets = malloc((size_t)(rows + 1) * sizeof *offsets);
  for (int64_t row = 0; row < rows; row++)
    for (int64_t column = 0; column < columns; column++)
      if ((int)(drawn() % 100) < density) bitmask[row * stride + column / 8] |= (uint8_t)(1 << column % 8);
  if (atp_offsets(bitmask, rows, columns, offsets) != -1) return failed("offsets");
  count = offsets[rows];
  uint8_t *values = malloc((size_t)(count * size + shift + 1)), *scales = malloc((size_t)(rows * groups * 4));
  uint8_t *bias = malloc((size_t)rows * 2), *x = malloc((size_t)(400 * columns) * 4 + 1);
  fill(values + shift, type, count);
  fill(scales, FLOAT, rows * groups);
  fill(bias, BF16, rows);
  struct matrix matrix = {.values = values + shift, .bitmask = bitmask, .offsets = offsets, .scales = scales,
                          .bias = bias, .rows = rows, .columns = columns, .count = count, .groups = groups,
                          .type = type, .bias_type = BF16};
  for (int32_t kind = BF16; kind <= FLOAT; kind++) {
    uint8_t *dense[2], *y[2];
    fill(x + shift, kind, 400 * columns);
    for (int tokens = 1; tokens <= MOST_TOKENS; tokens++) {
      for (int which = 0; which < 2; which++) {
        matrix.isa = which ? NEON : PORTABLE;
        y[which] = malloc((size_t)(tokens * rows) * 4);
        dense[which] = malloc((size_t)(rows * columns) * 4);
        if (atp_product(&matrix, x + shift, kind, tokens, y[which], 1) != FINE) return failed("error");
        if (atp_unpack(&matrix, 0, rows, dense[which], kind, 1) != FINE) return failed("error");
      }
      if (memcmp(dense[0], dense[1], (size_t)(rows * columns * size_of(kind))) != 0) return failed("unpack");
      if (apart(y[0], y[1], kind, type, columns, tokens * rows)) return failed("product");
      for (int which = 0; which < 2; which++) free(y[which]), free(dense[which]);
    }
    for (int64_t tokens = 9; tokens <= (columns <= 64 ? 400 : 70); tokens = tokens * 3 - 7)
      if (compared_many(&matrix, x + shift, kind, tokens)) return 1;
  }
  free(bitmask), free(offsets), free(values), free(scales), free(bias), free(x);
  return 0;
}

int main(void) {
  static const int64_t columns[] = {1, 7, 31, 33, 64, 128, 576, 1000};
  if (!(atp_setup() >> NEON & 1)) return failed("no NEON");
  for (int type = BF16; type <= GROUPED_INT8; type++)
    for (size_t k = 0; k < sizeof columns / sizeof *columns; k++)
      for (int density = 0; density <= 100; density += 25) {
        if (type == GROUPED_INT8 && columns[k] % 64 != 0) continue;
        if (compared(type, 5, columns[k], density, (int)(k % 2))) return 1;
      }
  puts("done");
  return 0;
}
