"""What a process runs on: cores, processor, ONNX Runtime, threads, a terminal to draw progress on."""
