/* Vectors of 16 values with AVX-512: a register each. */

#include "isa.h"

#define INLINE static inline __attribute__((always_inline)) TARGET

typedef __m512 Floats;
typedef __m512i Ints; /* of 32 bits, or 64 bytes */

/* Of a tile: 16 to 24 registers of 32. */
#define INT8_ROWS 8
#define INT4_ROWS 8
enum { INT8_PANELS = 3, INT4_PANELS = 2, ATTENTION_ROWS = 12, ATTENTION_PANELS = 2 };
#define WIDE 1

/* The first `count` of 16. */
INLINE __mmask16 first_of(int64_t count) {
  return count >= LANES ? (__mmask16)0xffff : count > 0 ? (__mmask16)((1u << count) - 1) : (__mmask16)0;
}

INLINE Floats floats_of(float x) { return _mm512_set1_ps(x); }
INLINE Floats no_floats(void) { return _mm512_setzero_ps(); }
INLINE Floats load(const float *x) { return _mm512_loadu_ps(x); }
INLINE void store(float *to, Floats x) { _mm512_storeu_ps(to, x); }
/* The first `count` values and zeros. */
INLINE Floats load_some(const float *x, int64_t count) { return _mm512_maskz_loadu_ps(first_of(count), x); }
INLINE void store_some(float *to, Floats x, int64_t count) { _mm512_mask_storeu_ps(to, first_of(count), x); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }                      /* b where one is NaN */
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); } /* a * b + c */
INLINE Floats subtract_product(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a * b */
INLINE float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }
INLINE float first_value(Floats x) { return _mm512_cvtss_f32(x); }
INLINE int has_nan(Floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }

/* x where from <= i < to, else `other`. */
INLINE Floats between(Floats x, int64_t from, int64_t to, Floats other) {
  return _mm512_mask_mov_ps(other, first_of(to) & (__mmask16)~first_of(from), x);
}

/* The sum of 16 values in the order ((i, i + 8), + 4, + 2, + 1). */
INLINE float sum_of(Floats x) {
  const __m256 high = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(x), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

INLINE Ints ints_of(int32_t x) { return _mm512_set1_epi32(x); }
INLINE Ints no_ints(void) { return _mm512_setzero_si512(); }
INLINE Ints load_ints(const void *x) { return _mm512_loadu_si512(x); }
INLINE void store_ints(void *to, Ints x) { _mm512_storeu_si512(to, x); }
INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Ints sub_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
INLINE Ints mul_ints(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
INLINE Ints larger_int(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
INLINE Ints smaller_int(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
INLINE Ints and_ints(Ints a, Ints b) { return _mm512_and_si512(a, b); }
INLINE Ints high_halves(Ints bytes) { /* of 4 bits, of each byte */
  return _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
}
INLINE Ints low_halves(Ints bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
INLINE Ints ints_from_bytes(const uint8_t *x) { /* 16 */
  return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)x));
}
INLINE int32_t largest_int(Ints x) { return _mm512_reduce_max_epi32(x); }
INLINE int32_t sum_of_ints(Ints x) { return _mm512_reduce_add_epi32(x); }
INLINE Ints bits_of(Floats x) { return _mm512_castps_si512(x); }
INLINE Floats floats_of_bits(Ints x) { return _mm512_castsi512_ps(x); }
INLINE Floats floats_from(Ints x) { return _mm512_cvtepi32_ps(x); }
INLINE Ints rounded(Floats x) { return _mm512_cvtps_epi32(x); }
INLINE Floats whole_of(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Floats scaled_by_power(Floats x, Floats whole) { return _mm512_scalef_ps(x, whole); } /* x * 2^whole */

/* The first `count` of values in 0 .. 255 as bytes; all as bytes with a sign. */
INLINE void store_bytes(uint8_t *to, Ints x, int64_t count) {
  _mm512_mask_cvtepi32_storeu_epi8(to, first_of(count), x);
}
INLINE void store_signed_bytes(int8_t *to, Ints x) { _mm_storeu_si128((__m128i *)to, _mm512_cvtsepi32_epi8(x)); }

/* 16 rows of 16 values as columns. */
INLINE void transpose(Floats *r) {
  __m512i t[LANES], u[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2) {
    t[i] = _mm512_unpacklo_epi32(bits_of(r[i]), bits_of(r[i + 1]));
    t[i + 1] = _mm512_unpackhi_epi32(bits_of(r[i]), bits_of(r[i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 8)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      t[i + j] = _mm512_shuffle_i32x4(u[i + j], u[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(u[i + j], u[i + j + 4], 0xdd);
    }
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) {
    r[j] = floats_of_bits(_mm512_shuffle_i32x4(t[j], t[j + 8], 0x88));
    r[j + 8] = floats_of_bits(_mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd));
  }
}
