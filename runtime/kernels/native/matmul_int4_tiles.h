/* Tiles of 4-bit matmuls, and the rows that they take, for one instruction set: included by the isa_*.c. */

enum { GROUP = 8 }; /* values of a column in a line */

typedef struct {
  const int8_t *a;
  const float *a_scales;
  const uint8_t *b, *next;
  int64_t next_step;
  const float *scales, *bias, *branch;
  const uint8_t *zeros;
  float *y;
} Int4Tile;

INLINE Ints int4_four(const int8_t *values) {
  int32_t four;
  memcpy(&four, values, sizeof four);
  return ints_of(four);
}

/* The tile's totals: in registers where those are enough for the sums of a block too. */
#if WIDE
#define TOTALS Floats total[INT4_ROWS][INT4_PANELS]
#define TOTAL(i, j) total[i][j]
#define SET_TOTAL(i, j, value) (total[i][j] = (value))
#define KEEP_TOTALS
#else
#define TOTALS float total[INT4_ROWS][INT4_PANELS][LANES] __attribute__((aligned(LINE)))
#define TOTAL(i, j) load(total[i][j])
#define SET_TOTAL(i, j, value) store(total[i][j], value)
#define KEEP_TOTALS __asm__ volatile("" : : "r"(total) : "memory") /* where they are */
#endif

INLINE void int4_tile(const Int4Product *p, const Int4Tile *t, const int rows, const int panels, int last) {
  const Int4Weight *weight = p->weight;
  const int64_t width = weight->blocks * weight->block;
  TOTALS;
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < panels; j++) SET_TOTAL(i, j, no_floats());

#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < panels; j++) fetch_result(t->y + i * weight->columns + j * LANES);

  const uint8_t *line = t->b, *next = t->next;
  const int8_t *a = t->a;
#if !WIDE
  const int8_t *row[INT4_ROWS]; /* a register each, which takes no addition a step */
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) {
    row[i] = a + i * width;
    __asm__("" : "+r"(row[i]));
  }
#endif
  for (int64_t block = 0; block < weight->blocks; block++) {
    Ints sum[INT4_ROWS][INT4_PANELS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
      for (int j = 0; j < panels; j++) sum[i][j] = no_ints();
#pragma GCC unroll 1
    for (int64_t left = weight->lines; left > 0; left--, line += LINE, a += GROUP) {
      Ints low[INT4_PANELS], high[INT4_PANELS];
      _mm_prefetch((const char *)next, _MM_HINT_T1);
      next += t->next_step;
#if WIDE
      const int64_t panel = weight->blocks * weight->lines * LINE;
#pragma GCC unroll 2
      for (int j = 0; j < panels; j++) {
        const Ints both = load_ints(line + j * panel);
        low[j] = low_halves(both);
        high[j] = high_halves(both);
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) {
        const Ints first = int4_four(a + i * width), second = int4_four(a + i * width + GROUP / 2);
#pragma GCC unroll 2
        for (int j = 0; j < panels; j++) sum[i][j] = dot_short(dot_short(sum[i][j], low[j], first), high[j], second);
      }
#else /* one half after the other, for want of registers */
      const int64_t at = a - t->a;
      low[0] = low_halves(load_ints(line));
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) sum[i][0] = dot_short(sum[i][0], low[0], int4_four(row[i] + at));
      high[0] = high_halves(load_ints(line));
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) sum[i][0] = dot_short(sum[i][0], high[0], int4_four(row[i] + at + GROUP / 2));
#endif
    }
    KEEP_TOTALS;
#pragma GCC unroll 2
    for (int j = 0; j < panels; j++) {
      const int64_t of_block = (j * weight->blocks + block) * LANES;
      const Floats scale = load(t->scales + of_block);
      const Floats zero = mul(scale, floats_from(ints_from_bytes(t->zeros + of_block)));
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) {
        const float *of_row = t->a_scales + (i * weight->blocks + block) * 2;
        const Floats scaled = mul(floats_from(widened(sum[i][j])), floats_of(of_row[0]));
        const Floats sum_so_far = multiply_add(scaled, scale, TOTAL(i, j));
        SET_TOTAL(i, j, subtract_product(floats_of(of_row[1]), zero, sum_so_far));
      }
    }
    KEEP_TOTALS;
  }
#pragma GCC unroll 2
  for (int j = 0; j < panels; j++) {
    const int count = j == panels - 1 ? last : LANES;
    const Floats bias = t->bias == NULL ? no_floats() : load_some(t->bias + j * LANES, count);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      Floats y = add(TOTAL(i, j), bias);
      if (t->branch != NULL) y = add(y, load(t->branch + (i * panels + j) * LANES));
      store_some(t->y + i * weight->columns + j * LANES, y, count);
    }
  }
}

typedef void (*RunInt4Tile)(const Int4Product *, const Int4Tile *, int);
#define INT4_TILE(rows, panels) \
  static TARGET void int4_tile_##rows##_##panels(const Int4Product *p, const Int4Tile *t, int last) { \
    int4_tile(p, t, rows, panels, last); \
  }
#if WIDE
#define INT4_TILES(rows) INT4_TILE(rows, 1) INT4_TILE(rows, 2)
#define INT4_NAMES(rows) {int4_tile_##rows##_1, int4_tile_##rows##_2}
#else
#define INT4_TILES(rows) INT4_TILE(rows, 1)
#define INT4_NAMES(rows) {int4_tile_##rows##_1}
#endif
/* clang-format off */
INT4_TILES(1) INT4_TILES(2) INT4_TILES(3) INT4_TILES(4)
#if INT4_ROWS > 4
INT4_TILES(5)
#endif
#if INT4_ROWS > 5
INT4_TILES(6)
#endif
#if INT4_ROWS > 6
INT4_TILES(7) INT4_TILES(8)
#endif
static const RunInt4Tile RUN_INT4_TILE[INT4_ROWS][INT4_PANELS] = {
    INT4_NAMES(1), INT4_NAMES(2), INT4_NAMES(3), INT4_NAMES(4),
#if INT4_ROWS > 4
    INT4_NAMES(5),
#endif
#if INT4_ROWS > 5
    INT4_NAMES(6),
#endif
#if INT4_ROWS > 6
    INT4_NAMES(7), INT4_NAMES(8),
#endif
};
/* clang-format on */

static void int4_strip(const void *product, Strip *s) {
  const Int4Product *p = product;
  const Int4Weight *weight = p->weight;
  const int64_t width = weight->blocks * weight->block, panel = weight->blocks * weight->lines * LINE;
  const uint8_t *b = weight->panels + s->column / LANES * panel;
  const Int4Tile tile = {
      .a = p->values + s->row * width,
      .a_scales = p->a_scales + s->row * weight->blocks * 2,
      .b = b,
      .next = s->next < 0 ? b : weight->panels + s->next * panel,
      .next_step = s->next < 0 ? 0 : LINE,
      .scales = weight->scales + s->column * weight->blocks,
      .bias = p->bias == NULL ? NULL : p->bias + s->column,
      .branch = s->branch,
      .zeros = weight->zeros + s->column * weight->blocks,
      .y = p->y + s->row * weight->columns + s->column,
  };
  RUN_INT4_TILE[s->rows - 1][s->panels - 1](p, &tile, s->last);
}

/* A part of a block to int8: round(a * inverse), zeros behind its `count` values; and their sum. */
static TARGET int32_t int4_quantize(const float *a, int64_t count, int64_t size, float inverse, int8_t *values) {
  const Floats factor = floats_of(inverse);
  Ints sum = no_ints();
  for (int64_t i = 0; i < size; i += LANES) {
    const Ints q = rounded(mul(load_some(a + i, count - i), factor));
    sum = add_ints(sum, q);
    store_signed_bytes(values + i, q);
  }
  return sum_of_ints(sum);
}

static TARGET float int4_peak(const float *a, int64_t count) { return peak_of(a, count); }

/* A row, block by block: the scale is max |a| / 127, for all parts of a block. */
static void int4_quantize_row(const Int4Product *p, int64_t row) {
  const Int4Weight *weight = p->weight;
  const float *a = p->a + row * weight->depth;
  for (int64_t part = 0; part < weight->blocks; part += weight->parts) {
    const int64_t whole = weight->block * weight->parts, left = weight->depth - part * weight->block;
    const float peak = int4_peak(a + part * weight->block, left < whole ? left : whole), scale = peak / 127.0f;
    const float inverse = peak != 0 ? 127.0f / peak : 0.0f;
    for (int64_t i = part; i < part + weight->parts; i++) {
      const int64_t from = i * weight->block, at = row * weight->blocks + i;
      const int32_t sum =
          int4_quantize(a + from, weight->depth - from, weight->block, inverse, p->values + at * weight->block);
      p->a_scales[at * 2] = scale;
      p->a_scales[at * 2 + 1] = scale * (float)sum;
    }
  }
}
