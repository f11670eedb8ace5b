"""What a process runs on: processor, cores and memory; ONNX Runtime itself, threads, forks, progress.

Knows nothing of bundles. Each read of /proc stands here once.
"""
