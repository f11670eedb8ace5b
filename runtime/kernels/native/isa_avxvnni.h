/* The operators with 256-bit VNNI; isa_avxvnni.c and isa_avxvnni_evex.c say how its one instruction is encoded. */

#include <cpuid.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "vectors_avx2.h"

/* Adds 4 products to each of 16 sums; a: bytes without a sign, b: with one. */
INLINE Ints dot(Ints sum, Ints a, Ints b) {
  return (Ints){DPBUSD(sum.low, a.low, b.low), DPBUSD(sum.high, a.high, b.high)};
}

/* For 4-bit weights, whose sums are as wide. */
INLINE Ints dot_short(Ints sum, Ints a, Ints b) { return dot(sum, a, b); }
INLINE Ints widened(Ints sum) { return sum; }

#include "isa_operators.h"

static const Typed *attention(int floats) { return (void)floats, &typed_float32; }

static const Int8 INT8 = {INT8_ROWS, INT8_PANELS, int8_strip, int8_add_sums, NULL, NULL, 0, NULL};
static const Int4 INT4 = {INT4_ROWS, INT4_PANELS, int4_strip, int4_quantize_row, 0};
