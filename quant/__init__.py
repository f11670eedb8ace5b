"""Arithmetic on arrays, nothing else: int8, int4, GPTQ, rotations, embedding tables, fidelity measures."""
