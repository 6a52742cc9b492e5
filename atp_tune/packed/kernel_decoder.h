/* All blocks of a decoder for the next token of up to 8 texts, in one call; part of kernel.c.

   A block is h += o(attention(q, k, v of norm(h))), h += down(silu(gate(norm(h))) up(norm(h))), as in Llama, Mistral
   and Qwen: RMS norms, rotary positions, heads that share keys and values. Everything between the products is float32.

   The threads stay together for the whole call. In each step they take rows, or heads, until there are none, and wait
   for each other. What all of them need of h, such as its norm, each computes for itself: that is faster than to wait.
   Every number is computed by one thread in an order of its own, so that bits do not depend on how many there are. */

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed to no function that is not inlined */

enum { LANES = 16, MOST_SIZE = 256, STEPS = 7 }; /* floats of a vector; of a head; steps of a block */
typedef float floats __attribute__((vector_size(64), aligned(4)));
typedef float eights __attribute__((vector_size(32)));
typedef float fours __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(64), aligned(4)));
typedef uint32_t words __attribute__((vector_size(64), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));

/* The same as decoder.py's Structures. A norm, of the decoder's type, may be NULL: there is none. */
struct layer {
  const struct matrix *q, *k, *v, *o, *gate, *up, *down;
  const uint8_t *before, *of_q, *of_k, *after; /* norms [width], [size], [size], [width] */
  uint8_t *keys, *values;                      /* [texts, shared, room, size] of the decoder's type */
  int64_t room;
};

struct decoder {
  const struct layer *layers;
  const uint8_t *norm;
  void *parallel, *team; /* GOMP_parallel, omp_get_num_threads */
  int64_t count, width, heads, shared, size, inner;
  float epsilon, scaling;
  int32_t type, isa; /* BF16 or FLOAT, of norms, keys and values, and of the loops that multiply */
};

/* What the threads of a call share. */
struct token {
  const struct decoder *decoder;
  const uint8_t *seen; /* [texts, length + 1], or NULL: all */
  int64_t length;      /* positions before this one */
  int32_t texts, alone;
  float *h, *q, *k, *v, *mixed, *gate, *up, *added; /* [texts, …] */
  float *cosines, *sines;                           /* [texts, size] */
  uint8_t *own;                                     /* of each thread `each` bytes */
  size_t each;
  _Atomic int64_t *next; /* [blocks, STEPS]: how far the rows of a step, or its heads, were taken */
  _Atomic int64_t arrived, entered;
  _Atomic int not_finite;
};

INLINE floats floats_at(const uint8_t *at, int32_t type, int64_t index) {
  if (type == FLOAT) return *(const floats *)(const void *)(at + 4 * index);
  const halves narrow = *(const halves *)(const void *)(at + 2 * index);
  return (floats)(__builtin_convertvector(narrow, words) << 16);
}

INLINE floats all(float x) { return (floats){0} + x; }

INLINE float sum_of(floats x) {
  const union { floats whole; eights halves[2]; } of = {.whole = x};
  const union { eights whole; fours halves[2]; } of_half = {.whole = of.halves[0] + of.halves[1]};
  const fours sums = of_half.halves[0] + of_half.halves[1];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

INLINE floats exp_of(floats x) { /* within 2 units of the last place; 0 and infinity are not reached */
  const floats least = all(-87.0f), most = all(88.0f);
  const ints low = x < least, high = x > most;
  x = (floats)(((ints)x & ~low & ~high) | ((ints)least & low) | ((ints)most & high));
  const floats shifted = x * 0x1.715476p0f + 0x1.8p23f, whole = shifted - 0x1.8p23f; /* the nearest integer */
  const floats rest = x - whole * 0x1.62e4p-1f - whole * 0x1.7f7d1cp-20f;
  floats sum = rest * (1.0f / 5040) + 1.0f / 720;
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  return (floats)((ints)sum + ((ints)shifted << 23));
}

INLINE float inverse_root(float x) { /* by Newton's steps, which need no library */
  double root = float_of_bits(0x5f3759df - (bits_of_float(x) >> 1));
  for (int i = 0; i < 4; i++) root *= 1.5 - 0.5 * (double)x * root * root;
  return (float)root;
}

/* `count` numbers x / root(mean of squares + epsilon), times a weight. */
INLINE void root_mean_square(const float *x, const uint8_t *weight, const struct decoder *decoder, int64_t count,
                             float *y) {
  floats squares = {0};
  for (int64_t i = 0; i < count; i += LANES) squares += *(const floats *)(x + i) * *(const floats *)(x + i);
  const float factor = inverse_root(sum_of(squares) / (float)count + decoder->epsilon);
  for (int64_t i = 0; i < count; i += LANES)
    *(floats *)(y + i) = *(const floats *)(x + i) * factor * floats_at(weight, decoder->type, i);
}

/* A head's query or key, with its norm if it has one, turned by its position. */
INLINE void turned(const struct token *token, const float *x, const uint8_t *weight, int64_t text, float *y) {
  const struct decoder *decoder = token->decoder;
  const int64_t size = decoder->size, half = size / 2, at = text * size;
  float normed[MOST_SIZE];
  if (weight)
    root_mean_square(x, weight, decoder, size, normed);
  else
    memcpy(normed, x, (size_t)size * sizeof *x);
  const float *cosines = token->cosines + at, *sines = token->sines + at;
  for (int64_t i = 0; i < half; i++) y[i] = normed[i] * cosines[i] - normed[half + i] * sines[i];
  for (int64_t i = 0; i < half; i++) y[half + i] = normed[half + i] * cosines[half + i] + normed[i] * sines[half + i];
}

/* Numbers as they are kept, of the decoder's type. */
INLINE void narrow(const float *x, int64_t count, int32_t type, uint8_t *y) {
  if (type == FLOAT) {
    memcpy(y, x, (size_t)count * sizeof *x);
    return;
  }
  for (int64_t i = 0; i < count; i++) {
    const uint16_t bits = bf16_of(x[i]);
    memcpy(y + 2 * i, &bits, sizeof bits);
  }
}

/* What a head of a text attends to: the keys and values before, and its own, which the first of those that share them
   writes behind those. `memory`: floats [length + LANES]. */
INLINE void attend(struct token *token, const struct layer *layer, int64_t text, int64_t head, float *memory,
                   int64_t size, int32_t type) {
  const struct decoder *decoder = token->decoder;
  const int64_t group = decoder->heads / decoder->shared, of = text * decoder->shared + head / group;
  const int64_t bytes = size_of(type), length = token->length, first = of * layer->room * size;
  float query[MOST_SIZE], key[MOST_SIZE];
  uint8_t last[2][4 * MOST_SIZE]; /* this key and value as they are kept */
  turned(token, token->q + (text * decoder->heads + head) * size, layer->of_q, text, query);
  turned(token, token->k + of * size, layer->of_k, text, key);
  narrow(key, size, type, last[0]);
  narrow(token->v + of * size, size, type, last[1]);
  if (head % group == 0) {
    memcpy(layer->keys + (first + length * size) * bytes, last[0], (size_t)(size * bytes));
    memcpy(layer->values + (first + length * size) * bytes, last[1], (size_t)(size * bytes));
  }
  float most = -__FLT_MAX__;
  for (int64_t t = 0; t <= length; t++) {
    const uint8_t *keys = t < length ? layer->keys + (first + t * size) * bytes : last[0];
    floats sum = {0};
    for (int64_t i = 0; i < size; i += LANES) sum += *(const floats *)(query + i) * floats_at(keys, type, i);
    memory[t] = sum_of(sum) * decoder->scaling;
    if (token->seen && !token->seen[text * (length + 1) + t]) memory[t] = -__FLT_MAX__;
    if (memory[t] > most) most = memory[t];
  }
  for (int64_t t = length + 1; t % LANES; t++) memory[t] = -__FLT_MAX__;
  floats sum = {0}, mixed[MOST_SIZE / LANES] = {{0}};
  for (int64_t t = 0; t <= length; t += LANES) {
    const ints unseen = *(floats *)(memory + t) == all(-__FLT_MAX__);
    const floats shares = (floats)((ints)exp_of(*(floats *)(memory + t) - most) & ~unseen);
    *(floats *)(memory + t) = shares;
    sum += shares;
  }
  const float total = sum_of(sum);
  for (int64_t t = 0; t <= length; t++) {
    const uint8_t *values = t < length ? layer->values + (first + t * size) * bytes : last[1];
    for (int64_t i = 0; i < size / LANES; i++) mixed[i] += floats_at(values, type, i * LANES) * memory[t];
  }
  float *to = token->mixed + (text * decoder->heads + head) * size;
  for (int64_t i = 0; i < size / LANES; i++) *(floats *)(to + i * LANES) = mixed[i] / total;
}

/* The same with loops whose length the compiler knows, for the usual sizes. */
INLINE void attend_by_size(struct token *token, const struct layer *layer, int64_t head, float *memory) {
  const struct decoder *decoder = token->decoder;
  const int64_t text = head / decoder->heads, of = head % decoder->heads;
#define ATTEND(SIZE, TYPE) \
  if (decoder->size == SIZE && decoder->type == TYPE) { \
    attend(token, layer, text, of, memory, SIZE, TYPE); \
    return; \
  }
  ATTEND(64, FLOAT)
  ATTEND(64, BF16)
  ATTEND(128, FLOAT)
  ATTEND(128, BF16)
#undef ATTEND
  attend(token, layer, text, of, memory, decoder->size, decoder->type);
}

INLINE int takes_codes(const struct matrix *matrix) { return matrix->bits > 0; }

static size_t size_to_prepare(const struct matrix *matrix, int32_t texts) {
#if defined(__x86_64__)
  if (takes_codes(matrix)) return codes_prepared_size(matrix, texts);
#endif
  const size_t narrow = (size_t)(matrix->columns * texts) * 2;
  return prepared_size(matrix, texts) + narrow;
}

/* `prepare` for either kind of weight, of floats. Dot products of bfloat16 take what a model of that type has. */
static struct job prepare_floats(struct token *token, const struct matrix *matrix, const float *x, uint8_t *memory) {
  const int32_t texts = token->texts;
#if defined(__x86_64__)
  if (takes_codes(matrix)) {
    struct job job = codes_prepare(matrix, (const uint8_t *)x, FLOAT, texts, memory);
    if (atomic_load(&job.not_finite)) atomic_store(&token->not_finite, 1);
    return job;
  }
#endif
  if (token->decoder->type != BF16) return prepare(matrix, (const uint8_t *)x, FLOAT, texts, memory);
  const int64_t count = texts * matrix->columns;
  narrow(x, count, BF16, memory);
  struct job job = prepare(matrix, memory, BF16, texts, memory + 2 * count);
  job.y_type = FLOAT;
  return job;
}

INLINE void wait_for_all(struct token *token, int64_t team, int64_t *round) {
  if (team == 1) return;
  const int64_t all = team * ++*round;
  if (atomic_fetch_add(&token->arrived, 1) + 1 == all) return;
  for (int spins = 0; atomic_load(&token->arrived) < all; spins++) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
#if defined(__linux__)
    if (spins > 4000) sched_yield(); /* another program may have the processor */
#endif
  }
}

/* Rows of y = x times a weight, and then of `added` on h. */
INLINE void multiply_rows(struct token *token, const struct matrix *matrix, const float *x, float *y, float *h,
                          _Atomic int64_t *next, int64_t team, uint8_t *memory) {
  struct job job = prepare_floats(token, matrix, x, memory);
  const int64_t rows = matrix->rows, chunk = chunk_of(rows, 4, team);
  job.y = (uint8_t *)y;
  for (int64_t first, last; take(next, rows, chunk, &first, &last);) {
    job.loop(&job, first, last);
    if (h)
      for (int64_t t = 0; t < token->texts; t++)
        for (int64_t row = first; row < last; row++) h[t * rows + row] += y[t * rows + row];
  }
}

/* What a thread does for a token, together with the others of its team. */
INLINE void decode(struct token *token, int64_t team) {
  const struct decoder *decoder = token->decoder;
  const int64_t texts = token->texts, width = decoder->width, inner = decoder->inner;
  uint8_t *own = token->own + token->each * (size_t)atomic_fetch_add(&token->entered, 1);
  float *normed = (float *)(void *)own;
  uint8_t *memory = own + (size_t)(texts * width) * sizeof(float);
  int64_t round = 0;
  for (int64_t block = 0; block < decoder->count; block++) {
    const struct layer *layer = decoder->layers + block;
    _Atomic int64_t *next = token->next + block * STEPS;
    for (int64_t t = 0; t < texts; t++)
      root_mean_square(token->h + t * width, layer->before, decoder, width, normed + t * width);
    multiply_rows(token, layer->q, normed, token->q, NULL, next, team, memory);
    multiply_rows(token, layer->k, normed, token->k, NULL, next + 1, team, memory);
    multiply_rows(token, layer->v, normed, token->v, NULL, next + 2, team, memory);
    wait_for_all(token, team, &round);
    for (int64_t head, end; take(next + 3, texts * decoder->heads, 1, &head, &end);)
      attend_by_size(token, layer, head, (float *)(void *)memory);
    wait_for_all(token, team, &round);
    multiply_rows(token, layer->o, token->mixed, token->added, token->h, next + 4, team, memory);
    wait_for_all(token, team, &round);
    for (int64_t t = 0; t < texts; t++)
      root_mean_square(token->h + t * width, layer->after, decoder, width, normed + t * width);
    struct job gate = prepare_floats(token, layer->gate, normed, memory);
    struct job up = prepare_floats(token, layer->up, normed, memory + size_to_prepare(layer->gate, token->texts));
    gate.y = (uint8_t *)token->gate, up.y = (uint8_t *)token->up;
    for (int64_t first, last; take(next + 5, inner, chunk_of(inner, 4, team), &first, &last);) {
      gate.loop(&gate, first, last);
      up.loop(&up, first, last);
      for (int64_t t = 0; t < texts; t++)
        for (int64_t row = first; row < last; row += LANES) {
          const int64_t left = last - row < LANES ? last - row : LANES;
          const size_t bytes = (size_t)left * sizeof(float);
          floats x = {0}, y = {0};
          memcpy(&x, token->gate + t * inner + row, bytes), memcpy(&y, token->up + t * inner + row, bytes);
          x = x / (exp_of(-x) + 1.0f) * y;
          memcpy(token->gate + t * inner + row, &x, bytes);
        }
    }
    wait_for_all(token, team, &round);
    multiply_rows(token, layer->down, token->gate, token->added, token->h, next + 6, team, memory);
    wait_for_all(token, team, &round);
  }
}

#if defined(__x86_64__)
avx512_TARGET static void avx512_decode(struct token *token, int64_t team) { decode(token, team); }
avx2_TARGET static void avx2_decode(struct token *token, int64_t team) { decode(token, team); }
#endif
static void portable_decode(struct token *token, int64_t team) { decode(token, team); }

static void decode_in_team(void *data) {
  struct token *token = data;
  const struct decoder *decoder = token->decoder;
  int (*members)(void) = NULL;
  if (decoder->team) memcpy(&members, &decoder->team, sizeof members);
  const int64_t team = members && !token->alone ? members() : 1;
#if defined(__x86_64__)
  if (decoder->isa == AVX2) {
    avx2_decode(token, team);
    return;
  }
  if (decoder->isa != PORTABLE) {
    avx512_decode(token, team);
    return;
  }
#endif
  portable_decode(token, team);
}

/* y [texts, width] = the next token's x [texts, width] behind all blocks and the norm, both of the decoder's type;
   its keys and values stand behind the `length` that are there. NOT_FINITE, with y undefined: as of a product. */
int32_t atp_decode(const struct decoder *decoder, const uint8_t *x, const uint8_t *cosines, const uint8_t *sines,
                   const uint8_t *seen, int64_t length, int32_t texts, uint8_t *y, int32_t threads) {
  const int64_t size = decoder->size, width = decoder->width, of_heads = decoder->heads * size;
  if ((decoder->type != BF16 && decoder->type != FLOAT) || texts < 1 || texts > MOST_TOKENS || length < 0 ||
      size < LANES || size > MOST_SIZE || size % LANES || width % LANES || threads < 1 ||
      decoder->heads % decoder->shared)
    return WRONG_ARGUMENT;
  /* What a thread needs: a normed h, and the inputs of one product, of two, or the scores of a head. */
  size_t most = (size_t)(length + LANES) * sizeof(float);
  for (int64_t block = 0; block < decoder->count; block++) {
    const struct layer *layer = decoder->layers + block;
    if (length >= layer->room) return WRONG_ARGUMENT;
    const size_t sizes[] = {
        size_to_prepare(layer->q, texts), size_to_prepare(layer->k, texts), size_to_prepare(layer->v, texts),
        size_to_prepare(layer->o, texts), size_to_prepare(layer->down, texts),
        size_to_prepare(layer->gate, texts) + size_to_prepare(layer->up, texts)};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) most = sizes[i] > most ? sizes[i] : most;
  }
  const size_t each = ((size_t)(texts * width) * sizeof(float) + most + 127) / 64 * 64;
  const int64_t inner = decoder->inner, of_shared = decoder->shared * size;
  const int64_t floats_of_all = 2 * texts * (width + of_heads + of_shared + size + inner);
  const int64_t counters = decoder->count * STEPS;
  uint8_t *memory = malloc((size_t)floats_of_all * sizeof(float) + each * (size_t)threads + 64);
  _Atomic int64_t *next = malloc((size_t)counters * sizeof *next + 1);
  if (memory == NULL || next == NULL) {
    free(memory), free((void *)next);
    return NO_MEMORY;
  }
  for (int64_t i = 0; i < counters; i++) atomic_init(next + i, 0);
  uint8_t *own = memory + (64 - (uintptr_t)memory % 64) % 64;
  float *h = (float *)(void *)(own + each * (size_t)threads), *added = h + texts * width, *q = added + texts * width;
  float *mixed = q + texts * of_heads, *k = mixed + texts * of_heads, *v = k + texts * of_shared;
  float *gate = v + texts * of_shared, *up = gate + texts * inner, *turns = up + texts * inner;
  struct token token = {.decoder = decoder, .cosines = turns, .sines = turns + texts * size, .seen = seen,
                        .length = length, .texts = texts, .h = h, .q = q, .k = k, .v = v, .mixed = mixed,
                        .gate = gate, .up = up, .added = added, .own = own, .each = each, .next = next,
                        .alone = threads == 1 || !decoder->parallel || !decoder->team};
  for (int64_t i = 0; i < texts * width; i++) h[i] = load_number(x, decoder->type, i);
  for (int64_t i = 0; i < texts * size; i++) {
    token.cosines[i] = load_number(cosines, decoder->type, i);
    token.sines[i] = load_number(sines, decoder->type, i);
  }
  if (token.alone) {
    decode_in_team(&token);
  } else {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    memcpy(&parallel, &decoder->parallel, sizeof parallel);
    parallel(decode_in_team, &token, (unsigned)threads, 0);
  }
  for (int64_t t = 0; t < texts; t++) {
    float *normed = added + t * width;
    memcpy(normed, h + t * width, (size_t)width * sizeof *h);
    if (decoder->norm) root_mean_square(h + t * width, decoder->norm, decoder, width, normed);
  }
  narrow(added, texts * width, decoder->type, y);
  const int not_finite = atomic_load(&token.not_finite);
  free(memory), free((void *)next);
  return not_finite ? NOT_FINITE : FINE;
}
