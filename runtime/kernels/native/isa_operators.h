/* The operators' inner loops, over the vectors and products of bytes of the instruction set that includes this. */

#include "vectors_common.h"

#include "matmul_int4_tiles.h"
#include "matmul_int8_tiles.h"
#include "quantize_rows.h"

#define TYPED(name) name##_float32
#define TYPED_TARGET TARGET
#define INLINE_TYPED INLINE
#define PER_UNIT 1
#include "attention_typed.h"

static const RowFunctions ROWS = {quantize_row_of, multiply, rotate};
