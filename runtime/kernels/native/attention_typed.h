/* The part of attention.c that knows what a unit of 32 bits holds: included with PER_UNIT 1, a float32, and 2, a
   pair of bfloat16. */

/* Values of a row as units, of which the last is filled up with zero. */
static TARGET void TYPED(pack_row)(const float *x, int64_t width, __m512 scale, uint32_t *units) {
  for (int64_t i = 0; i < width; i += LANES) {
    const __m512 row = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes_left(width - i), x + i), scale);
#if PER_UNIT == 2
    _mm256_mask_storeu_epi32(units + i / 2, (__mmask8)lanes_left((width - i + 1) / 2),
                             (__m256i)_mm512_cvtneps_pbh(row));
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

/* Scores of a row, those from .. to, become weights in units, those of begin .. end beside them zeros; what the
   row's result so far is to be multiplied by. `begin` is a multiple of 16. */
static TARGET float TYPED(weigh)(const float *scores, int64_t begin, int64_t from, int64_t to, int64_t end,
                                 Running *running, uint32_t *weights) {
  const float before = running->top;
  __m512 largest = _mm512_set1_ps(before);
  for (int64_t j = from / LANES * LANES; j < to; j += LANES) {
    const __mmask16 mask = lanes_left(to - j) & (__mmask16)~lanes_left(from - j);
    largest = _mm512_mask_max_ps(largest, mask, largest, _mm512_loadu_ps(scores + j));
  }
  const float top = from < to ? _mm512_reduce_max_ps(largest) : before;
  const __m512 tops = _mm512_set1_ps(top);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = begin; j < end; j += LANES) {
    const __mmask16 mask = lanes_left(to - j) & (__mmask16)~lanes_left(from - j);
    const __m512 score = _mm512_sub_ps(_mm512_loadu_ps(scores + j), tops);
    const __m512 weight = _mm512_maskz_mov_ps(mask, power_of_2(score));
    sum = _mm512_add_ps(sum, weight);
#if PER_UNIT == 2
    _mm256_storeu_si256((__m256i *)(weights + j / 2), (__m256i)_mm512_cvtneps_pbh(weight));
#else
    _mm512_storeu_ps(weights + j, weight);
#endif
  }
  if (top == before) { /* also where no score is seen */
    running->sum += _mm512_reduce_add_ps(sum);
    return 1;
  }
  const float keep = before == -INFINITY ? 0 : _mm512_cvtss_f32(power_of_2(_mm512_set1_ps(before - top)));
  running->sum = running->sum * keep + _mm512_reduce_add_ps(sum);
  running->top = top;
  return keep;
}

/* 16 rows of 16 units as columns. */
static TARGET inline void TYPED(transpose)(__m512i *r) {
  __m512i t[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 8)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

/* 16 units of a key, zeros behind its end. */
static TARGET inline __m512i TYPED(units_of)(const float *key, int64_t left) {
#if PER_UNIT == 2
  const __m512 one = _mm512_maskz_loadu_ps(lanes_left(left), key);
  const __m512 two = _mm512_maskz_loadu_ps(lanes_left(left - LANES), key + LANES);
  return (__m512i)_mm512_cvtne2ps_pbh(two, one);
#else
  return _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes_left(left), key));
#endif
}

/* Keys from .. to, multiples of 16, as panels of 16 keys, a line for each unit of theirs, and values as panels of 16
   values of a head, a line for one key or two; zeros behind the last key and value. */
static TARGET void TYPED(pack)(const Attention *a, int64_t head, int64_t from, int64_t to, Packed packed) {
  const int64_t text = head / a->kernel->kv_heads, width = a->kernel->kv_heads * a->size;
  const int64_t first = text * a->tokens * width + head % a->kernel->kv_heads * a->size;
  const float *k = a->k + first, *v = a->v + first;
  for (int64_t j = from; j < to; j += LANES)
    for (int64_t u = 0; u < a->units; u += LANES) {
      __m512i row[LANES];
      for (int64_t i = 0; i < LANES; i++)
        row[i] = j + i < a->tokens ? TYPED(units_of)(k + (j + i) * width + u * PER_UNIT, a->size - u * PER_UNIT)
                                   : _mm512_setzero_si512();
      TYPED(transpose)(row);
      uint32_t *line = packed.keys + j * a->units + u * LANES;
      for (int64_t i = 0; i < LANES && u + i < a->units; i++) _mm512_storeu_si512(line + i * LANES, row[i]);
    }
  for (int64_t panel = 0; panel < a->panels; panel++) {
    const __mmask16 mask = lanes_left(a->size - panel * LANES);
    uint32_t *line = packed.values + (panel * a->padded + from) / PER_UNIT * LANES;
    for (int64_t j = from; j < to; j += PER_UNIT, line += LANES) {
      const float *at = v + j * width + panel * LANES;
      const __m512 one = _mm512_maskz_loadu_ps(j < a->tokens ? mask : 0, at);
#if PER_UNIT == 2
      const __m512 two = _mm512_maskz_loadu_ps(j + 1 < a->tokens ? mask : 0, at + width);
      const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(one));
      const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(two));
      _mm512_storeu_si512(line, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
      _mm512_storeu_ps(line, one);
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

static const Typed TYPED(typed) = {TYPED(pack), TYPED(pack_rows), TYPED(weigh), TYPED(tile), PER_UNIT};
