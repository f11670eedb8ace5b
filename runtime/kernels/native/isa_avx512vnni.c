/* The operators with AVX512-VNNI: Intel's servers since 2019, AMD's processors since Zen 4. Attention is in bfloat16
   where AVX512-BF16 is there too. */

#include <stdlib.h>
#include <string.h>

#include "attention.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#if (defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10)
#define HAS_BFLOAT16 1 /* the compiler knows its instructions */
#endif
#include "vectors_avx512.h"

/* Adds 4 products to each of 16 sums; a: bytes without a sign, b: with one. */
INLINE Ints dot(Ints sum, Ints a, Ints b) { return _mm512_dpbusd_epi32(sum, a, b); }

/* For 4-bit weights, whose sums are as wide. */
INLINE Ints dot_short(Ints sum, Ints a, Ints b) { return dot(sum, a, b); }
INLINE Ints widened(Ints sum) { return sum; }

#include "isa_operators.h"

#ifdef HAS_BFLOAT16
#define TYPED(name) name##_bfloat16
#define TYPED_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16")))
#define INLINE_TYPED static inline __attribute__((always_inline)) TYPED_TARGET
#define PER_UNIT 2
#include "attention_typed.h"
#endif

static int runs_here(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

static const Typed *attention(int floats) {
#ifdef HAS_BFLOAT16
  __builtin_cpu_init();
  if (!floats && __builtin_cpu_supports("avx512bf16")) return &typed_bfloat16;
#endif
  (void)floats;
  return &typed_float32;
}

static const Int8 INT8 = {INT8_ROWS, INT8_PANELS, int8_strip, int8_add_sums, NULL, NULL, 0, NULL};
static const Int4 INT4 = {INT4_ROWS, INT4_PANELS, int4_strip, int4_quantize_row, 0};

const Isa isa_avx512vnni = {"avx512-vnni", runs_here, &INT8, &INT4, &ROWS, attention};
