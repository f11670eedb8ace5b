"""What Hugging Face's and sentence-transformers' files say about a model; no ONNX here."""
