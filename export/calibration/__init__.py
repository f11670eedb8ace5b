"""What calibration texts teach: smoothing constants, GPTQ's Hessians, which layers need more bits.

What it computes goes back as values; ``writing`` stores them. Its only files are unnamed ones (``scratch.py``).
"""
