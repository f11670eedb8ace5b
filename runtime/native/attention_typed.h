/* The part of attention.c that knows what a unit of 32 bits holds: included with PER_UNIT 1, a float32, and 2, a
   pair of bfloat16. */

#if PER_UNIT == 2
/* 16 floats as bfloat16, rounded to the nearest, even where two are. */
static TARGET inline __m512i TYPED(halves)(__m512 x) {
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
}
#endif

/* Values of a row as units, of which the last is filled up with zero. */
static TARGET void TYPED(pack_row)(const float *x, int64_t width, __m512 scale, uint32_t *units) {
  for (int64_t i = 0; i < width; i += LANES) {
    const __m512 row = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes_left(width - i), x + i), scale);
#if PER_UNIT == 2
    _mm256_mask_storeu_epi32(units + i / 2, (__mmask8)lanes_left((width - i + 1) / 2), (__m256i)_mm512_cvtneps_pbh(row));
#else
    _mm512_mask_storeu_ps(units + i, lanes_left(width - i), row);
#endif
  }
}

static TARGET void TYPED(pack_rows)(const Attention *a, const float *q, int64_t rows, uint32_t *to) {
  const float log2_e = 1.44269504088896341f; /* weights are powers of two */
  const __m512 scale = _mm512_set1_ps(a->kernel->scale * log2_e);
  for (int64_t i = 0; i < rows; i++)
    TYPED(pack_row)(q + i * a->kernel->heads * a->size, a->size, scale, to + i * a->units);
  const int64_t padded = up_to(rows, 4);
  memset(to + rows * a->units, 0, (size_t)((padded - rows) * a->units) * sizeof *to);
}

static TARGET void TYPED(pack_weights)(const float *weights, int64_t from, int64_t to, uint32_t *units) {
  TYPED(pack_row)(weights + from, to - from, _mm512_set1_ps(1), units + from / PER_UNIT);
}

/* Keys from .. to as panels of 16 keys, a line for each unit of theirs, and values as panels of 16 values of a
   head, a line for one key or two; zeros behind the last key and value. */
static TARGET void TYPED(pack)(const Attention *a, int64_t head, int64_t from, int64_t to) {
  const int64_t text = head / a->kernel->kv_heads, width = a->kernel->kv_heads * a->size;
  const int64_t first = text * a->tokens * width + head % a->kernel->kv_heads * a->size;
  const float *k = a->k + first, *v = a->v + first;
  uint32_t *keys = a->keys + head * key_units(a), *values = a->values + head * value_units(a);
  uint32_t row[LANES];
  for (int64_t j = from; j < to; j++) {
    uint32_t *panel = keys + j / LANES * LANES * a->units + j % LANES;
    for (int64_t u = 0; u < a->units; u += LANES / PER_UNIT) {
      memset(row, 0, sizeof row);
      if (j < a->tokens)
        TYPED(pack_row)(k + j * width + u * PER_UNIT, least(LANES, a->size - u * PER_UNIT), _mm512_set1_ps(1), row);
      for (int64_t i = 0; i < LANES / PER_UNIT && u + i < a->units; i++) panel[(u + i) * LANES] = row[i];
    }
  }
  for (int64_t panel = 0; panel < a->panels; panel++) {
    const __mmask16 mask = lanes_left(a->size - panel * LANES);
    uint32_t *line = values + (panel * a->padded + from) / PER_UNIT * LANES;
    for (int64_t j = from; j < to; j += PER_UNIT, line += LANES) {
      const float *at = v + j * width + panel * LANES;
#if PER_UNIT == 2
      const __m512i one = TYPED(halves)(_mm512_maskz_loadu_ps(j < a->tokens ? mask : 0, at));
      const __m512i two = TYPED(halves)(_mm512_maskz_loadu_ps(j + 1 < a->tokens ? mask : 0, at + width));
      _mm512_storeu_si512(line, _mm512_or_si512(one, _mm512_slli_epi32(two, 16)));
#else
      _mm512_storeu_ps(line, _mm512_maskz_loadu_ps(j < a->tokens ? mask : 0, at));
#endif
    }
  }
}

/* sum + a . b for each lane's unit. */
static TARGET inline __attribute__((always_inline)) __m512 TYPED(multiplied)(__m512 sum, __m512i a, __m512i b) {
#if PER_UNIT == 2
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
#endif
}

static TARGET inline __attribute__((always_inline)) void TYPED(tile_of)(const uint32_t *a, int64_t a_step,
                                                                       const uint32_t *b, int64_t b_panel,
                                                                       int64_t steps, float *c, int64_t c_step,
                                                                       const float *keep, const int rows,
                                                                       const int panels) {
  __m512 sum[TILE_ROWS][TILE_PANELS];
#pragma GCC unroll 12
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < panels; j++) {
      const __m512 before = keep == NULL ? _mm512_setzero_ps() : _mm512_loadu_ps(c + i * c_step + j * LANES);
      sum[i][j] = keep == NULL ? before : _mm512_mul_ps(before, _mm512_set1_ps(keep[i]));
    }
  for (int64_t k = 0; k < steps; k++) {
    __m512i line[TILE_PANELS];
#pragma GCC unroll 2
    for (int j = 0; j < panels; j++) line[j] = _mm512_loadu_si512(b + j * b_panel + k * LANES);
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
      const __m512i unit = _mm512_set1_epi32((int32_t)a[i * a_step + k]);
#pragma GCC unroll 2
      for (int j = 0; j < panels; j++) sum[i][j] = TYPED(multiplied)(sum[i][j], unit, line[j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < panels; j++) _mm512_storeu_ps(c + i * c_step + j * LANES, sum[i][j]);
}

/* c[rows, 16 * panels] = keep * c + a . b, or a . b where `keep` is null; rows: 4, 8 or 12. */
static TARGET void TYPED(tile)(const uint32_t *a, int64_t a_step, const uint32_t *b, int64_t b_panel, int64_t steps,
                               float *c, int64_t c_step, const float *keep, int rows, int panels) {
#define OF(rows, panels) TYPED(tile_of)(a, a_step, b, b_panel, steps, c, c_step, keep, rows, panels)
  if (panels == 2) {
    if (rows == 12) OF(12, 2);
    else if (rows == 8) OF(8, 2);
    else OF(4, 2);
  } else {
    if (rows == 12) OF(12, 1);
    else if (rows == 8) OF(8, 1);
    else OF(4, 1);
  }
#undef OF
}

static const Typed TYPED(typed) = {TYPED(pack), TYPED(pack_rows), TYPED(pack_weights), TYPED(tile), PER_UNIT};
