/* Instruction sets: what each of them brings to the operators. isa_avx512vnni.c, isa_avxvnni.c and isa_avx2.c compile
   one text per operator (matmul_int8_tiles.h, matmul_int4_tiles.h, quantize_rows.h, attention_typed.h), each with
   its own vectors_*.h. */

#ifndef EMBEDGE_ISA_H
#define EMBEDGE_ISA_H

#include "kernels.h"

/* ---- 8-bit matmuls: matmul_int8.c ---- */

typedef struct {
  int64_t depth, columns;
  int64_t lines;        /* of a panel: depth / 4, rounded up */
  const int8_t *panels; /* lines of 64 bytes */
  int8_t *owned;        /* the panels, where they are a copy */
  int32_t *sums;        /* of each column, [panels * 16] */
  int64_t *starts;      /* only where lines are `arranged`: the first line of each panel, and of none behind them */
  uint32_t *sources;    /* likewise: of each line, where its 4 values of a row lie among the row's arranged bytes;
                           without `starts`, of each line of any panel */
} Int8Weight;

typedef struct {
  const Int8Weight *weight;
  int subtracts;
  const uint8_t *a;
  int64_t a_step;                         /* bytes from row to row */
  const float *a_scale, *b_scale, *added; /* added: null for none */
  float *y;
  int64_t a_scale_step, added_step;
  int32_t zero_point;
  int one_a_scale, one_b_scale; /* for all rows: multiplied with the columns' first, as ONNX Runtime does */
} Int8Product;

typedef struct {
  int rows, panels; /* of a tile */
  void (*strip)(const void *product, Strip *strip);
  void (*add_sums)(const int8_t *lines, int64_t count, int32_t *sums); /* of the 16 columns of a panel's lines */
  /* Null, or: brings the panels of a weight into the lines that this set multiplies exactly; 0: out of memory. */
  int (*arrange_weight)(Int8Weight *weight);
  void (*arrange_row)(const uint8_t *row, int64_t depth, uint8_t *arranged);
  int64_t arranged;                                 /* bytes of a row for each line */
  int (*exact)(const int8_t *lines, int64_t count); /* likewise: whether it multiplies lines exactly as they lie */
} Int8;

/* Brings a product's rows, all of a matmul, into the order that an instruction set reads: a copy, to be released. */
OrtStatus *arrange_rows(const OrtApi *api, const OrtKernelContext *context, const Int8 *isa, Int8Product *product,
                        int64_t rows, uint8_t **arranged);

/* ---- 4-bit matmuls: matmul_int4.c ---- */

typedef struct {
  int64_t depth, columns, block, blocks; /* blocks of a column, each of `block` values */
  int64_t parts;                         /* how many blocks have a scale, and that of rows, in common */
  int64_t lines;                         /* of a block in a panel */
  const uint8_t *panels;
  uint8_t *owned;
  float *scales;  /* [panels, blocks, 16] */
  uint8_t *zeros; /* likewise */
} Int4Weight;

typedef struct {
  const Int4Weight *weight;
  const float *a, *bias; /* bias: null for none; ONNX Runtime puts the one that is added behind into the operator */
  float *y;
  int8_t *values;  /* [rows, blocks * block] */
  float *a_scales; /* [rows, blocks, 2]: scale, and scale times the sum of the values */
} Int4Product;

typedef struct {
  int rows, panels;
  void (*strip)(const void *product, Strip *strip);
  void (*quantize_row)(const Int4Product *product, int64_t row);
  int64_t largest_block; /* that its sums hold; 0: any */
} Int4;

/* ---- Rows: quantize.c ---- */

typedef struct {
  const struct RowFunctions *isa;
  const float *x, *y, *rotation; /* y, rotation: of what is multiplied and rotated first */
  int block, gated;              /* of the rotation; whether x passes SiLU before */
  const uint8_t *zero_points;
  const float *floor;
  float step;
  int64_t rows, width, rows_per_task;
  uint8_t *values;
  float *scales, *product;
  int failed;
} Rows;

typedef struct RowFunctions {
  void (*quantize)(const Rows *rows, int64_t row, const float *x);
  void (*multiply)(const float *x, const float *y, int64_t width, int gated, float *product); /* x * y, silu(x) * y */
  void (*rotate)(const float *x, int64_t width, const float *rotation, int block, float *to);
} RowFunctions;

/* Quantizes rows of x as they are. */
OrtStatus *quantize_all(const OrtApi *api, OrtKernelContext *context, Rows *rows);

/* ---- Attention: attention.c ---- */

struct Typed;

/* ---- An instruction set ---- */

typedef struct {
  const char *name; /* a value of EMBEDGE_KERNELS */
  int (*runs_here)(void);
  const Int8 *int8;
  const Int4 *int4;
  const RowFunctions *rows;
  const struct Typed *(*attention)(int floats); /* in float32 where `floats` asks for it, else as is best */
} Isa;

extern const Isa isa_avx512vnni, isa_avxvnni, isa_avxvnni_evex, isa_avx2;

/* The set that is in use; the best of the processor's unless another was asked for. Null: the processor has none. */
const Isa *isa_in_use(void);

#endif
