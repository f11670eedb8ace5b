"""How a Linear's weight is stored and multiplied: float32, float16, int8, int4, mixtures."""
