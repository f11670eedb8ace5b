/* Rows of floats as unsigned bytes, for one instruction set: included by the isa_*.c. */

/* round(x / scale) + zero_point, in 0 .. 255. */
static TARGET void quantize_row(const float *x, int64_t width, float scale, uint8_t zero_point, uint8_t *values) {
  const Floats scales = floats_of(scale);
  const Ints zero = ints_of(zero_point), top = ints_of(255);
  for (int64_t i = 0; i < width; i += LANES) {
    const Ints q = add_ints(rounded(divide(load_some(x + i, width - i), scales)), zero);
    store_bytes(values + i, smaller_int(larger_int(q, no_ints()), top), width - i);
  }
}

/* The largest of x; NaN where one is. */
static TARGET float top_of(const float *x, int64_t width) {
  const Floats lowest = floats_of(-__builtin_inff());
  Floats largest = lowest;
  int broken = 0;
  for (int64_t i = 0; i < width; i += LANES) {
    const Floats v = load_some(x + i, width - i);
    broken |= has_nan(v);
    largest = larger(largest, between(v, 0, width - i, lowest));
  }
  return broken ? __builtin_nanf("") : largest_of(largest);
}

static TARGET void quantize_row_of(const Rows *r, int64_t row, const float *x) {
  float peak = r->floor == NULL ? peak_of(x, r->width) : top_of(x, r->width);
  if (r->floor != NULL && peak < *r->floor) peak = *r->floor; /* false for a NaN */
  const float scale = peak * r->step;
  r->scales[row] = scale;
  quantize_row(x, r->width, scale, r->zero_points[row], r->values + row * r->width);
}

/* x * y, or silu(x) * y. */
static TARGET void multiply(const float *x, const float *y, int64_t width, int gated, float *product) {
  const Floats one = floats_of(1), minus_log2_e = floats_of(-1.44269504088896341f);
  for (int64_t i = 0; i < width; i += LANES) {
    Floats v = load_some(x + i, width - i);
    if (gated) v = divide(v, add(one, power_of_2(mul(v, minus_log2_e))));
    store_some(product + i, mul(v, load_some(y + i, width - i)), width - i);
  }
}

enum { AT_ONCE = 4 }; /* blocks that are rotated at once, so that no sum waits for the one before */

/* Each block of a row times the rotation [block, block], whose rows are summed in their order. */
INLINE void rotate_blocks(const float *x, int64_t blocks, const float *rotation, const int block, float *to) {
  for (int64_t b = 0; b < blocks; b += AT_ONCE) {
    const int count = blocks - b < AT_ONCE ? (int)(blocks - b) : AT_ONCE;
    Floats sum[AT_ONCE];
#pragma GCC unroll 4
    for (int j = 0; j < AT_ONCE; j++) sum[j] = no_floats();
#pragma GCC unroll 16
    for (int k = 0; k < block; k++) {
      const Floats row = load_some(rotation + k * block, block);
#pragma GCC unroll 4
      for (int j = 0; j < AT_ONCE; j++) {
        const float value = x[(b + (j < count ? j : 0)) * block + k];
        sum[j] = multiply_add(row, floats_of(value), sum[j]);
      }
    }
    for (int j = 0; j < count; j++) store_some(to + (b + j) * block, sum[j], block);
  }
}

static TARGET void rotate(const float *x, int64_t width, const float *rotation, int block, float *to) {
  if (block == LANES) rotate_blocks(x, width / LANES, rotation, LANES, to);
  else rotate_blocks(x, width / block, rotation, block, to);
}
