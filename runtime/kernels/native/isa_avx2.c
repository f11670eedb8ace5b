/* The operators with AVX2 and FMA: processors since 2013 (Intel) and 2015 (AMD).

   vpmaddubsw multiplies 32 bytes and adds pairs in 16 bits, where 255 * (w0 + w1) may not fit. It does where the
   positive weights of a pair sum up to 128 at most, and the negative ones to -128 at least: so do all but some percent
   of a model's. So the lines of a weight are arranged once, when a session opens. A line whose pairs do not fit is
   taken with its 4 rows of the depth paired in another way, of three; where none fits, it becomes two lines whose sum
   it is. Each line says which of a row's values it is multiplied with. The products are exact, by three instructions
   for 32 of them; int16 factors (vpmaddwd) take four. */

#include <stdlib.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma")))
#include "attention.h"
#include "vectors_avx2.h"

/* The additions stand where they are written: compilers move all products before them, for which there are no
   registers. */
INLINE __m256i added(__m256i sum, __m256i product) {
  __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
  return sum;
}
INLINE __m256i added_short(__m256i sum, __m256i product) {
  __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(product));
  return sum;
}

/* Adds 4 products to each of 16 sums; a: bytes without a sign, b: with one, of pairs that fit into 16 bits. */
INLINE Ints dot(Ints sum, Ints a, Ints b) {
  const __m256i one = _mm256_set1_epi16(1);
  sum.low = added(sum.low, _mm256_madd_epi16(one, _mm256_maddubs_epi16(a.low, b.low)));
  sum.high = added(sum.high, _mm256_madd_epi16(one, _mm256_maddubs_epi16(a.high, b.high)));
  return sum;
}

/* For 4-bit weights: adds 2 products to each of 32 sums of 16 bits, which hold those of a block:
   8 * 2 * 15 * 127 < 2^15. */
enum { LARGEST_BLOCK = 32 };
INLINE Ints dot_short(Ints sum, Ints a, Ints b) {
  sum.low = added_short(sum.low, _mm256_maddubs_epi16(a.low, b.low));
  sum.high = added_short(sum.high, _mm256_maddubs_epi16(a.high, b.high));
  return sum;
}
INLINE Ints widened(Ints sum) {
  const __m256i one = _mm256_set1_epi16(1);
  return (Ints){_mm256_madd_epi16(sum.low, one), _mm256_madd_epi16(sum.high, one)};
}

#define ARRANGED 1
#include "isa_operators.h"

/* ---- Lines of weights whose pairs fit into 16 bits ---- */

enum { PAIRINGS = 3, SPLIT = PAIRINGS }; /* of 4 values: 01 23, 02 13, 03 12 */

INLINE __m256i paired(__m256i groups, int pairing) {
  static const uint8_t ORDER[PAIRINGS][4] = {{0, 1, 2, 3}, {0, 2, 1, 3}, {0, 3, 1, 2}};
  int32_t order;
  memcpy(&order, ORDER[pairing], 4);
  const __m256i groups_of_lane =
      _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c);
  return _mm256_shuffle_epi8(groups, _mm256_add_epi8(_mm256_set1_epi32(order), groups_of_lane));
}

/* Whether the positive and the negative weights of each pair fit. */
INLINE int fits(__m256i weights) {
  const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi8(1);
  const __m256i positive = _mm256_maddubs_epi16(one, _mm256_max_epi8(weights, zero));
  const __m256i negative = _mm256_maddubs_epi16(one, _mm256_min_epi8(weights, zero));
  const __m256i over = _mm256_or_si256(_mm256_cmpgt_epi16(positive, _mm256_set1_epi16(128)),
                                       _mm256_cmpgt_epi16(_mm256_set1_epi16(-128), negative));
  return _mm256_testz_si256(over, over);
}

/* The first pairing in which a line fits, or SPLIT. */
static TARGET int pairing_of(const int8_t *line) {
  const Ints weights = load_ints(line);
  int pairing = 0;
  while (pairing < PAIRINGS && !(fits(paired(weights.low, pairing)) && fits(paired(weights.high, pairing)))) pairing++;
  return pairing;
}

/* Half of each weight, rounded down. */
INLINE __m256i halves_of(__m256i weights) {
  const __m256i sign = _mm256_set1_epi8((char)0x80), offset = _mm256_xor_si256(weights, sign);
  const __m256i half = _mm256_and_si256(_mm256_srli_epi16(offset, 1), _mm256_set1_epi8(0x7f));
  return _mm256_sub_epi8(half, _mm256_set1_epi8(64));
}

/* Writes a line as one or two; how many. */
static TARGET int arrange_line(const int8_t *from, int pairing, int8_t *to) {
  const Ints weights = load_ints(from);
  if (pairing != SPLIT) {
    store_ints(to, (Ints){paired(weights.low, pairing), paired(weights.high, pairing)});
    return 1;
  }
  const Ints half = {halves_of(weights.low), halves_of(weights.high)};
  store_ints(to, half);
  store_ints(to + LINE, (Ints){_mm256_sub_epi8(weights.low, half.low), _mm256_sub_epi8(weights.high, half.high)});
  return 2;
}

/* Whether lines fit as they lie: no value is above 64 in size, so no pair above 128. */
static TARGET int exact(const int8_t *lines, int64_t count) {
  const __m256i offset = _mm256_set1_epi8(64), most = _mm256_set1_epi8((char)128);
  __m256i largest = most;
  for (int64_t k = 0; k < count; k++) {
    const Ints weights = load_ints(lines + k * LINE);
    largest = _mm256_max_epu8(largest, _mm256_add_epi8(weights.low, offset));
    largest = _mm256_max_epu8(largest, _mm256_add_epi8(weights.high, offset));
  }
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(largest, most)) == -1;
}

enum { ROW_BYTES = 4 * PAIRINGS }; /* of a row, for each line: its 4 values in each of the pairings */

static int arrange_weight(Int8Weight *weight) {
  const int64_t panels = (weight->columns + LANES - 1) / LANES, lines = panels * weight->lines;
  int64_t split = 0;
  uint8_t *pairings = malloc((size_t)lines);
  if (pairings == NULL) return 0;
  for (int64_t i = 0; i < lines; i++) {
    pairings[i] = (uint8_t)pairing_of(weight->panels + i * LINE);
    split += pairings[i] == SPLIT;
  }
  int8_t *arranged = allocate((size_t)((lines + split) * LINE));
  weight->starts = allocate((size_t)(panels + 1) * sizeof *weight->starts);
  weight->sources = allocate((size_t)(lines + split) * sizeof *weight->sources);
  if (arranged == NULL || weight->starts == NULL || weight->sources == NULL) {
    free(pairings);
    release(arranged);
    return 0;
  }
  int64_t at = 0;
  for (int64_t i = 0; i < lines; i++) {
    const int64_t k = i % weight->lines;
    if (k == 0) weight->starts[i / weight->lines] = at;
    const int pairing = pairings[i] == SPLIT ? 0 : pairings[i];
    for (int left = arrange_line(weight->panels + i * LINE, pairings[i], arranged + at * LINE); left > 0; left--)
      weight->sources[at++] = (uint32_t)(k * ROW_BYTES + 4 * pairing);
  }
  weight->starts[panels] = at;
  free(pairings);
  release(weight->owned);
  weight->panels = weight->owned = arranged;
  return 1;
}

/* A row's groups of 4 values in their pairings: 4 groups a step. */
static TARGET void arrange_row(const uint8_t *row, int64_t depth, uint8_t *to) {
  const __m128i first = _mm_setr_epi8(0, 1, 2, 3, 0, 2, 1, 3, 0, 3, 1, 2, 4, 5, 6, 7);
  const __m128i second = _mm_setr_epi8(4, 6, 5, 7, 4, 7, 5, 6, 8, 9, 10, 11, 8, 10, 9, 11);
  const __m128i third = _mm_setr_epi8(8, 11, 9, 10, 12, 13, 14, 15, 12, 14, 13, 15, 12, 15, 13, 14);
  for (int64_t k = 0; k < depth; k += 16, to += 4 * ROW_BYTES) {
    uint8_t groups[16] = {0}, arranged[4 * ROW_BYTES];
    const int64_t left = depth - k < 16 ? depth - k : 16, used = (left + 3) / 4 * ROW_BYTES;
    memcpy(groups, row + k, (size_t)left);
    const __m128i values = _mm_loadu_si128((const __m128i *)groups);
    _mm_storeu_si128((__m128i *)arranged, _mm_shuffle_epi8(values, first));
    _mm_storeu_si128((__m128i *)(arranged + 16), _mm_shuffle_epi8(values, second));
    _mm_storeu_si128((__m128i *)(arranged + 32), _mm_shuffle_epi8(values, third));
    memcpy(to, arranged, (size_t)used);
  }
}

static int runs_here(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static const Int8 INT8 = {
    INT8_ROWS, INT8_PANELS, int8_strip, int8_add_sums, arrange_weight, arrange_row, ROW_BYTES, exact,
};
static const Int4 INT4 = {INT4_ROWS, INT4_PANELS, int4_strip, int4_quantize_row, LARGEST_BLOCK};

static const Typed *attention(int floats) { return (void)floats, &typed_float32; }

const Isa isa_avx2 = {"avx2", runs_here, &INT8, &INT4, &ROWS, attention};
