"""ONNX Runtime's sessions: opened, packed for this machine, shared among threads, closed."""
