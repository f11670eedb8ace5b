/* The part of attention.c that knows the instruction set, and what a unit of 32 bits holds: included by the isa_*.c,
   with PER_UNIT 1, a float32, and 2, a pair of bfloat16, which AVX512-BF16 alone multiplies. */

/* Values of a row as units, of which the last is filled up with zero. */
static TYPED_TARGET void TYPED(pack_row)(const float *x, int64_t width, Floats scale, uint32_t *units) {
  for (int64_t i = 0; i < width; i += LANES) {
    const Floats row = mul(load_some(x + i, width - i), scale);
#if PER_UNIT == 2
    _mm256_mask_storeu_epi32(units + i / 2, (__mmask8)first_of((width - i + 1) / 2), (__m256i)_mm512_cvtneps_pbh(row));
#else
    store_some((float *)units + i, row, width - i);
#endif
  }
}

static TYPED_TARGET void TYPED(pack_rows)(const Attention *a, const float *q, int64_t rows, uint32_t *to) {
  const float log2_e = 1.44269504088896341f; /* weights are powers of two */
  const Floats scale = floats_of(a->scale * log2_e);
  for (int64_t i = 0; i < rows; i++) TYPED(pack_row)(q + i * a->heads * a->size, a->size, scale, to + i * a->units);
  const int64_t padded = up_to(rows, 4);
  memset(to + rows * a->units, 0, (size_t)((padded - rows) * a->units) * sizeof *to);
}

/* Scores of a row, those from .. to, become weights in units, those of begin .. end beside them zeros; what the
   row's result so far is to be multiplied by. `begin` is a multiple of 16. */
static TYPED_TARGET float TYPED(weigh)(const float *scores, int64_t begin, int64_t from, int64_t to, int64_t end,
                                       Running *running, uint32_t *weights) {
  const float before = running->top;
  Floats largest = floats_of(before);
  for (int64_t j = from / LANES * LANES; j < to; j += LANES)
    largest = between(larger(largest, load(scores + j)), from - j, to - j, largest);
  const float top = from < to ? largest_of(largest) : before;
  const Floats tops = floats_of(top);
  Floats sum = no_floats();
  for (int64_t j = begin; j < end; j += LANES) {
    const Floats score = sub(load(scores + j), tops);
    const Floats weight = between(power_of_2(score), from - j, to - j, no_floats());
    sum = add(sum, weight);
#if PER_UNIT == 2
    _mm256_storeu_si256((__m256i *)(weights + j / 2), (__m256i)_mm512_cvtneps_pbh(weight));
#else
    store((float *)weights + j, weight);
#endif
  }
  if (top == before) { /* also where no score is seen */
    running->sum += sum_of(sum);
    return 1;
  }
  const float keep = before == -INFINITY ? 0 : first_value(power_of_2(floats_of(before - top)));
  running->sum = running->sum * keep + sum_of(sum);
  running->top = top;
  return keep;
}

/* 16 units of a key, zeros behind its end. */
INLINE_TYPED Floats TYPED(units_of)(const float *key, int64_t left) {
#if PER_UNIT == 2
  return floats_of_bits((Ints)_mm512_cvtne2ps_pbh(load_some(key + LANES, left - LANES), load_some(key, left)));
#else
  return load_some(key, left);
#endif
}

/* Keys from .. to, multiples of 16, as panels of 16 keys, a line for each unit of theirs, and values as panels of 16
   values of a head, a line for one key or two; zeros behind the last key and value. */
static TYPED_TARGET void TYPED(pack)(const Attention *a, int64_t head, int64_t from, int64_t to, Packed packed) {
  const int64_t text = head / a->kv_heads, width = a->kv_heads * a->size;
  const int64_t first = text * a->tokens * width + head % a->kv_heads * a->size;
  const float *k = a->k + first, *v = a->v + first;
  for (int64_t j = from; j < to; j += LANES)
    for (int64_t u = 0; u < a->units; u += LANES) {
      Floats row[LANES];
      for (int64_t i = 0; i < LANES; i++)
        row[i] = j + i < a->tokens ? TYPED(units_of)(k + (j + i) * width + u * PER_UNIT, a->size - u * PER_UNIT)
                                   : no_floats();
      transpose(row);
      uint32_t *line = packed.keys + j * a->units + u * LANES;
      for (int64_t i = 0; i < LANES && u + i < a->units; i++) store((float *)line + i * LANES, row[i]);
    }
  for (int64_t panel = 0; panel < a->panels; panel++) {
    const int64_t left = a->size - panel * LANES;
    uint32_t *line = packed.values + (panel * a->padded + from) / PER_UNIT * LANES;
    for (int64_t j = from; j < to; j += PER_UNIT, line += LANES) {
      const float *at = v + j * width + panel * LANES;
      const Floats one = load_some(at, j < a->tokens ? left : 0);
#if PER_UNIT == 2
      const Floats two = load_some(at + width, j + 1 < a->tokens ? left : 0);
      const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(one));
      const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(two));
      _mm512_storeu_si512(line, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
      store((float *)line, one);
#endif
    }
  }
}

/* sum + a . b for each lane's unit. */
INLINE_TYPED Floats TYPED(multiplied)(Floats sum, uint32_t a, Floats b) {
#if PER_UNIT == 2
  return _mm512_dpbf16_ps(sum, (__m512bh)ints_of((int32_t)a), (__m512bh)b);
#else
  return multiply_add(floats_of_bits(ints_of((int32_t)a)), b, sum);
#endif
}

INLINE_TYPED void TYPED(tile_of)(const uint32_t *a, int64_t a_step, const uint32_t *b, int64_t b_panel, int64_t steps,
                                 float *c, int64_t c_step, const float *keep, const int rows, const int panels) {
  Floats sum[ATTENTION_ROWS][ATTENTION_PANELS];
#pragma GCC unroll 12
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < panels; j++) {
      const Floats before = keep == NULL ? no_floats() : load(c + i * c_step + j * LANES);
      sum[i][j] = keep == NULL ? before : mul(before, floats_of(keep[i]));
    }
#pragma GCC unroll 1
  for (int64_t k = 0; k < steps; k++) {
    Floats line[ATTENTION_PANELS];
#pragma GCC unroll 2
    for (int j = 0; j < panels; j++) line[j] = load((const float *)b + j * b_panel + k * LANES);
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
      for (int j = 0; j < panels; j++) sum[i][j] = TYPED(multiplied)(sum[i][j], a[i * a_step + k], line[j]);
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < panels; j++) store(c + i * c_step + j * LANES, sum[i][j]);
}

/* c[rows, 16 * panels] = keep * c + a . b, or a . b where `keep` is null; rows: 4, 8 or 12, panels: 1 or 2. */
static TYPED_TARGET void TYPED(tile)(const uint32_t *a, int64_t a_step, const uint32_t *b, int64_t b_panel,
                                     int64_t steps, float *c, int64_t c_step, const float *keep, int rows, int panels) {
#define OF(rows, panels) TYPED(tile_of)(a, a_step, b, b_panel, steps, c, c_step, keep, rows, panels)
#if WIDE
  if (panels == 2) {
    if (rows == 12) OF(12, 2);
    else if (rows == 8) OF(8, 2);
    else OF(4, 2);
  } else {
    if (rows == 12) OF(12, 1);
    else if (rows == 8) OF(8, 1);
    else OF(4, 1);
  }
#else
  for (int j = 0; j < panels; j++, b += b_panel, c += LANES) {
    const uint32_t *row = a;
    float *to = c;
    for (int i = 0; i < rows;) {
      const int count = rows == 12 ? 6 : 4;
      const float *kept = keep == NULL ? NULL : keep + i;
      if (count == 6) TYPED(tile_of)(row, a_step, b, b_panel, steps, to, c_step, kept, 6, 1);
      else TYPED(tile_of)(row, a_step, b, b_panel, steps, to, c_step, kept, 4, 1);
      i += count;
      row += count * a_step;
      to += count * c_step;
    }
  }
#endif
#undef OF
}

static TYPED_TARGET void TYPED(store_row)(const float *result, float sum, int64_t size, float *y) {
  const Floats share = floats_of(sum == 0 ? 0 : 1 / sum); /* 0: of no tokens */
  for (int64_t d = 0; d < size; d += LANES) store_some(y + d, mul(load(result + d), share), size - d);
}

static const Typed TYPED(typed) = {TYPED(pack), TYPED(pack_rows), TYPED(weigh),
                                   TYPED(tile), TYPED(store_row), PER_UNIT};

#undef TYPED
#undef TYPED_TARGET
#undef INLINE_TYPED
#undef PER_UNIT
