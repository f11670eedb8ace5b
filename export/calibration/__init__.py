"""What calibration texts teach: smoothing, GPTQ's Hessians, which layers need more bits."""
