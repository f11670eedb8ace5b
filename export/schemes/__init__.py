"""How weights are stored and multiplied: float32, float16, int8, int4, mixtures; ``registry`` has the list.

Schemes write into graphs and say what has to be stored; they read no calibration texts and write no files.
"""
