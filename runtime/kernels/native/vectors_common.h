/* Functions of vectors of 16 values that are the same with every instruction set. */

/* max |x|. Magnitudes are compared as integers, among which a NaN is the largest. */
INLINE float peak_of(const float *x, int64_t width) {
  const Ints magnitude = ints_of(0x7fffffff);
  Ints peak = no_ints();
  for (int64_t i = 0; i < width; i += LANES)
    peak = larger_int(peak, and_ints(bits_of(load_some(x + i, width - i)), magnitude));
  const union {
    int32_t bits;
    float value;
  } found = {.bits = largest_int(peak)};
  return found.value;
}

/* 2^x, to some 2^-23 of it; NaN for a NaN and for both infinities. The power is split into a whole number and a part
   of [-1/2, 1/2], of which Taylor's polynomial is taken. */
INLINE Floats power_of_2(Floats x) {
  const Floats whole = whole_of(x), part = sub(x, whole);
  Floats y = floats_of(1.5403530394e-4f);
  y = multiply_add(y, part, floats_of(1.3333558146e-3f));
  y = multiply_add(y, part, floats_of(9.6181291076e-3f));
  y = multiply_add(y, part, floats_of(5.5504108665e-2f));
  y = multiply_add(y, part, floats_of(2.4022650696e-1f));
  y = multiply_add(y, part, floats_of(6.9314718056e-1f));
  y = multiply_add(y, part, floats_of(1.0f));
  return scaled_by_power(y, whole);
}

/* Brings what a tile will store near while it multiplies: stores that wait for memory would hold up the next tile's. */
INLINE void fetch_result(const float *y) { _mm_prefetch((const char *)y, _MM_HINT_T0); }
