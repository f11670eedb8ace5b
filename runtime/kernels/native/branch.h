/* Branches: products of low rank beside a matmul's own, whose right sides come with each run. branch.c has more. */

#ifndef EMBEDGE_BRANCH_H
#define EMBEDGE_BRANCH_H

#include "isa.h"

enum { BRANCH_INPUTS = 5 }; /* rows, their scales, their zero point, panels, the columns' scales */

/* A product with panels that are no constants. */
typedef struct {
  Tensor values; /* its rows */
  int64_t rows, columns;
  Int8Weight weight;
  Int8Product product;
  uint8_t *arranged; /* the rows, where an instruction set reads them in another order */
} PanelProduct;

/* A matmul, and the branch that is added to its result. */
typedef struct {
  void (*strip)(const void *product, Strip *strip); /* of the matmul */
  const void *product;
  const Int8 *isa; /* of the branch */
  PanelProduct branch;
} BranchedProduct;

/* Reads the branch's inputs, from `first` on, for a result [rows, columns]. Then, whatever came of it, close_branch. */
OrtStatus *open_branch(const OrtApi *api, const OrtKernelContext *context, size_t first, int64_t rows, int64_t columns,
                       BranchedProduct *both);
void close_branch(BranchedProduct *both);

/* A strip of the branch, then of the matmul. */
void branched_strip(const void *both, Strip *strip);

#endif
