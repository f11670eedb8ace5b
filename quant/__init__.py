"""Arithmetic on arrays, nothing else: int8, int4, GPTQ, rotations, embedding tables, fidelity measures.

No module here knows of ONNX, of files or of models; each states shapes and types of what it takes and gives.
"""
