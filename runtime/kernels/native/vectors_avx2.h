/* Vectors of 16 values with AVX2 and FMA: two registers each, so that sums have the order that AVX-512's have. What
   includes this file says which products of bytes there are: AVX-VNNI's, or AVX2's. */

#include "isa.h"

#define INLINE static inline __attribute__((always_inline)) TARGET

typedef struct {
  __m256 low, high;
} Floats;
typedef struct {
  __m256i low, high;
} Ints; /* of 32 bits, or 64 bytes */

/* Of a tile: 12 registers of 16. */
#define INT8_ROWS 6
#define INT4_ROWS 6
enum { INT8_PANELS = 1, INT4_PANELS = 1, ATTENTION_ROWS = 6, ATTENTION_PANELS = 1 };
#define WIDE 0

#define BOTH(type, function, ...) ((type){function(__VA_ARGS__), function(__VA_ARGS__)})
#define PAIR(type, function, x, y) ((type){function(x.low, y.low), function(x.high, y.high)})
#define ONE(type, function, x) ((type){function(x.low), function(x.high)})

/* The first `count` of 8, as masks of 32 bits. */
INLINE __m256i first_of(int64_t count) {
  const int32_t bounded = count > 8 ? 8 : count < 0 ? 0 : (int32_t)count;
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(bounded), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE Floats floats_of(float x) { return BOTH(Floats, _mm256_set1_ps, x); }
INLINE Floats no_floats(void) { return BOTH(Floats, _mm256_setzero_ps); }
INLINE Floats load(const float *x) { return (Floats){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
INLINE void store(float *to, Floats x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
/* The first `count` values and zeros. */
INLINE Floats load_some(const float *x, int64_t count) {
  if (count >= LANES) return load(x);
  return (Floats){_mm256_maskload_ps(x, first_of(count)), _mm256_maskload_ps(x + 8, first_of(count - 8))};
}
INLINE void store_some(float *to, Floats x, int64_t count) {
  if (count >= LANES) {
    store(to, x);
    return;
  }
  _mm256_maskstore_ps(to, first_of(count), x.low);
  _mm256_maskstore_ps(to + 8, first_of(count - 8), x.high);
}
INLINE Floats add(Floats a, Floats b) { return PAIR(Floats, _mm256_add_ps, a, b); }
INLINE Floats sub(Floats a, Floats b) { return PAIR(Floats, _mm256_sub_ps, a, b); }
INLINE Floats mul(Floats a, Floats b) { return PAIR(Floats, _mm256_mul_ps, a, b); }
INLINE Floats divide(Floats a, Floats b) { return PAIR(Floats, _mm256_div_ps, a, b); }
INLINE Floats larger(Floats a, Floats b) { return PAIR(Floats, _mm256_max_ps, a, b); } /* b where one is NaN */
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {                             /* a * b + c */
  return (Floats){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE Floats subtract_product(Floats a, Floats b, Floats c) { /* c - a * b */
  return (Floats){_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
INLINE float first_value(Floats x) { return _mm256_cvtss_f32(x.low); }
INLINE int has_nan(Floats x) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x.low, x.low, _CMP_UNORD_Q)) != 0 ||
         _mm256_movemask_ps(_mm256_cmp_ps(x.high, x.high, _CMP_UNORD_Q)) != 0;
}

/* x where from <= i < to, else `other`. */
INLINE __m256i mask_between(int64_t from, int64_t to) { return _mm256_andnot_si256(first_of(from), first_of(to)); }
INLINE Floats between(Floats x, int64_t from, int64_t to, Floats other) {
  if (from <= 0 && to >= LANES) return x;
  const __m256 low = _mm256_castsi256_ps(mask_between(from, to));
  const __m256 high = _mm256_castsi256_ps(mask_between(from - 8, to - 8));
  return (Floats){_mm256_blendv_ps(other.low, x.low, low), _mm256_blendv_ps(other.high, x.high, high)};
}

/* The sum of 16 values in the order ((i, i + 8), + 4, + 2, + 1). */
INLINE float sum_of(Floats x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
INLINE float largest_of(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

INLINE Ints ints_of(int32_t x) { return BOTH(Ints, _mm256_set1_epi32, x); }
INLINE Ints no_ints(void) { return BOTH(Ints, _mm256_setzero_si256); }
INLINE Ints load_ints(const void *x) {
  const __m256i *at = x;
  return (Ints){_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
INLINE void store_ints(void *to, Ints x) {
  __m256i *at = to;
  _mm256_storeu_si256(at, x.low);
  _mm256_storeu_si256(at + 1, x.high);
}
INLINE Ints add_ints(Ints a, Ints b) { return PAIR(Ints, _mm256_add_epi32, a, b); }
INLINE Ints sub_ints(Ints a, Ints b) { return PAIR(Ints, _mm256_sub_epi32, a, b); }
INLINE Ints mul_ints(Ints a, Ints b) { return PAIR(Ints, _mm256_mullo_epi32, a, b); }
INLINE Ints larger_int(Ints a, Ints b) { return PAIR(Ints, _mm256_max_epi32, a, b); }
INLINE Ints smaller_int(Ints a, Ints b) { return PAIR(Ints, _mm256_min_epi32, a, b); }
INLINE Ints and_ints(Ints a, Ints b) { return PAIR(Ints, _mm256_and_si256, a, b); }
INLINE Ints low_halves(Ints bytes) { /* 4 bits of each byte */
  const __m256i low = _mm256_set1_epi8(15);
  return (Ints){_mm256_and_si256(bytes.low, low), _mm256_and_si256(bytes.high, low)};
}
INLINE Ints high_halves(Ints bytes) {
  return low_halves((Ints){_mm256_srli_epi16(bytes.low, 4), _mm256_srli_epi16(bytes.high, 4)});
}
INLINE Ints ints_from_bytes(const uint8_t *x) { /* 16 */
  const __m128i bytes = _mm_loadu_si128((const __m128i *)x);
  return (Ints){_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
INLINE int32_t largest_int(Ints x) {
  const __m256i eight = _mm256_max_epi32(x.low, x.high);
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
INLINE int32_t sum_of_ints(Ints x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
INLINE Ints bits_of(Floats x) { return ONE(Ints, _mm256_castps_si256, x); }
INLINE Floats floats_of_bits(Ints x) { return ONE(Floats, _mm256_castsi256_ps, x); }
INLINE Floats floats_from(Ints x) { return ONE(Floats, _mm256_cvtepi32_ps, x); }
INLINE Ints rounded(Floats x) { return ONE(Ints, _mm256_cvtps_epi32, x); }
INLINE Floats whole_of(Floats x) {
  enum { TO_NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC };
  return (Floats){_mm256_round_ps(x.low, TO_NEAREST), _mm256_round_ps(x.high, TO_NEAREST)};
}
/* x * 2^whole, of x near 1: by two factors, of which the first leaves it exact. */
INLINE __m256 half_scaled(__m256 x, __m256 whole) {
  const __m256 bounded = _mm256_min_ps(_mm256_max_ps(whole, _mm256_set1_ps(-252)), _mm256_set1_ps(254));
  const __m256i power = _mm256_cvtps_epi32(bounded), half = _mm256_srai_epi32(power, 1), bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(power, half), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}
INLINE Floats scaled_by_power(Floats x, Floats whole) { return PAIR(Floats, half_scaled, x, whole); }

/* The first `count` of values in 0 .. 255 as bytes; 16 as bytes with a sign. */
INLINE void store_bytes(uint8_t *to, Ints x, int64_t count) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.low, x.high), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  if (count >= LANES) {
    _mm_storeu_si128((__m128i *)to, bytes);
    return;
  }
  uint8_t all[LANES];
  _mm_storeu_si128((__m128i *)all, bytes);
  if (count > 0) memcpy(to, all, (size_t)count);
}
INLINE void store_signed_bytes(int8_t *to, Ints x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xd8);
  _mm_storeu_si128((__m128i *)to, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

/* 8 rows of 8 values as columns. */
INLINE void transpose_8(__m256 *r) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  memcpy(r, t, sizeof t);
}

/* 16 rows of 16 values as columns. */
INLINE void transpose(Floats *r) {
  __m256 quarter[4][8];
  for (int i = 0; i < 8; i++) {
    quarter[0][i] = r[i].low;
    quarter[1][i] = r[i].high;
    quarter[2][i] = r[i + 8].low;
    quarter[3][i] = r[i + 8].high;
  }
  for (int q = 0; q < 4; q++) transpose_8(quarter[q]);
  for (int i = 0; i < 8; i++) {
    r[i] = (Floats){quarter[0][i], quarter[2][i]};
    r[i + 8] = (Floats){quarter[1][i], quarter[3][i]};
  }
}
