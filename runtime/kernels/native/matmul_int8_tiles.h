/* Tiles of 8-bit matmuls, for one instruction set: included by the isa_*.c. The layout of weights: README.md. */

#ifndef ARRANGED
#define ARRANGED 0 /* whether lines are those of vectors of 16-bit sums: isa_avx2.c */
#endif

typedef struct {
  const uint8_t *a; /* the first row, `a_step` bytes apart */
  const int8_t *b;  /* the first panel, `lines` lines apart */
  int64_t lines;
  const uint32_t *sources; /* only where ARRANGED: of each line, its 4 values among a row's */
  const int8_t *next;
  int64_t next_step; /* bytes to fetch ahead a step: a line, or 0 */
  const int32_t *sums;
  const float *a_scale, *b_scale, *added, *branch;
  float *y;
  int64_t y_step;
  int fetch_y; /* whether what is stored may lie far away */
} Int8Tile;

INLINE Ints four_values(const uint8_t *a, size_t count) {
  int32_t four = 0;
  memcpy(&four, a, count);
  return ints_of(four);
}

/* y[rows, columns] of a tile; `last` are the columns of the last panel that exist. */
INLINE void int8_tile(const Int8Product *p, const Int8Tile *t, const int rows, const int panels, int last) {
  const Int8Weight *weight = p->weight;
  const int64_t a_step = p->a_step, lines = t->lines, whole = ARRANGED ? lines : weight->depth / 4;
  const size_t tail = ARRANGED ? 0 : (size_t)(weight->depth % 4);
  const Ints minus_zero_point = ints_of(-p->zero_point);
  Ints sum[INT8_ROWS][INT8_PANELS];
#pragma GCC unroll 3
  for (int j = 0; j < panels; j++) {
    const Ints shift = mul_ints(minus_zero_point, load_ints(t->sums + j * LANES));
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) sum[i][j] = shift;
  }

  if (t->fetch_y)
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
      for (int j = 0; j < panels; j++) fetch_result(t->y + i * t->y_step + j * LANES);

  const uint8_t *row[INT8_ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) {
    row[i] = t->a + i * a_step;
    if (!WIDE) __asm__("" : "+r"(row[i])); /* a register each, which takes no addition a step */
  }
  const int8_t *next = t->next;
#pragma GCC unroll 1
  for (int64_t k = 0; k < whole; k++) {
    const int64_t at = ARRANGED ? (int64_t)t->sources[k] : 4 * k;
    Ints b[INT8_PANELS];
    _mm_prefetch((const char *)next, _MM_HINT_T1);
    next += t->next_step;
#pragma GCC unroll 3
    for (int j = 0; j < panels; j++) b[j] = load_ints(t->b + (j * lines + k) * LINE);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      const Ints four = four_values(row[i] + at, 4);
#pragma GCC unroll 3
      for (int j = 0; j < panels; j++) sum[i][j] = dot(sum[i][j], four, b[j]);
    }
  }
  if (tail != 0) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      const Ints four = four_values(row[i] + 4 * whole, tail);
#pragma GCC unroll 3
      for (int j = 0; j < panels; j++) sum[i][j] = dot(sum[i][j], four, load_ints(t->b + (j * lines + whole) * LINE));
    }
  }

#pragma GCC unroll 3
  for (int j = 0; j < panels; j++) {
    const int count = j == panels - 1 ? last : LANES;
    const Floats scale = p->one_b_scale ? floats_of(*t->b_scale) : load_some(t->b_scale + j * LANES, count);
    const Floats scales = p->one_a_scale ? mul(floats_of(*p->a_scale), scale) : scale;
    Floats y[INT8_ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) y[i] = mul(floats_from(sum[i][j]), scales);
    if (!p->one_a_scale)
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) y[i] = mul(y[i], floats_of(t->a_scale[i * p->a_scale_step]));
    if (t->added != NULL && p->subtracts)
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) y[i] = sub(y[i], load_some(t->added + i * p->added_step + j * LANES, count));
    else if (t->added != NULL)
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) y[i] = add(y[i], load_some(t->added + i * p->added_step + j * LANES, count));
    if (t->branch != NULL)
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) y[i] = add(y[i], load(t->branch + (i * panels + j) * LANES));
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) store_some(t->y + i * t->y_step + j * LANES, y[i], count);
  }
}

typedef void (*RunInt8Tile)(const Int8Product *, const Int8Tile *, int);
#define INT8_TILE(rows, panels) \
  static TARGET void int8_tile_##rows##_##panels(const Int8Product *p, const Int8Tile *t, int last) { \
    int8_tile(p, t, rows, panels, last); \
  }
#if WIDE
#define INT8_TILES(rows) INT8_TILE(rows, 1) INT8_TILE(rows, 2) INT8_TILE(rows, 3)
#define INT8_NAMES(rows) {int8_tile_##rows##_1, int8_tile_##rows##_2, int8_tile_##rows##_3}
#else
#define INT8_TILES(rows) INT8_TILE(rows, 1)
#define INT8_NAMES(rows) {int8_tile_##rows##_1}
#endif
/* clang-format off */
INT8_TILES(1) INT8_TILES(2) INT8_TILES(3) INT8_TILES(4)
#if INT8_ROWS > 4
INT8_TILES(5) INT8_TILES(6)
#endif
#if INT8_ROWS > 6
INT8_TILES(7) INT8_TILES(8)
#endif
static const RunInt8Tile RUN_INT8_TILE[INT8_ROWS][INT8_PANELS] = {
    INT8_NAMES(1), INT8_NAMES(2), INT8_NAMES(3), INT8_NAMES(4),
#if INT8_ROWS > 4
    INT8_NAMES(5), INT8_NAMES(6),
#endif
#if INT8_ROWS > 6
    INT8_NAMES(7), INT8_NAMES(8),
#endif
};
/* clang-format on */

static int64_t int8_first_line(const Int8Weight *weight, int64_t panel) {
  return ARRANGED && weight->starts != NULL ? weight->starts[panel] : panel * weight->lines;
}

static void int8_strip(const void *product, Strip *s) {
  const Int8Product *p = product;
  const Int8Weight *weight = p->weight;
  const int64_t panel = s->column / LANES, line = int8_first_line(weight, panel);
  const int8_t *b = weight->panels + line * LINE;
  const Int8Tile tile = {
      .a = p->a + s->row * p->a_step,
      .b = b,
      .lines = int8_first_line(weight, panel + 1) - line,
      .sources = !ARRANGED                ? NULL
                 : weight->starts != NULL ? weight->sources + line
                                          : weight->sources,
      .next = s->next < 0 ? b : weight->panels + int8_first_line(weight, s->next) * LINE,
      .next_step = s->next < 0 ? 0 : LINE,
      .sums = weight->sums + s->column,
      .a_scale = p->a_scale + s->row * p->a_scale_step,
      .b_scale = p->one_b_scale ? p->b_scale : p->b_scale + s->column,
      .added = p->added == NULL ? NULL : p->added + s->row * p->added_step + s->column,
      .branch = s->branch,
      .y = s->into != NULL ? s->into : p->y + s->row * weight->columns + s->column,
      .fetch_y = s->into == NULL,
      .y_step = s->into != NULL ? s->panels * LANES : weight->columns,
  };
  RUN_INT8_TILE[s->rows - 1][s->panels - 1](p, &tile, s->last);
}

/* Adds to sums[16] the four values of each column of lines. */
static TARGET void int8_add_sums(const int8_t *lines, int64_t count, int32_t *sums) {
  Ints sum = load_ints(sums);
  for (int64_t k = 0; k < count; k++) sum = dot(sum, ints_of(0x01010101), load_ints(lines + k * LINE));
  store_ints(sums, sum);
}
