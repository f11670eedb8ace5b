"""What Hugging Face's and sentence-transformers' files say about a model; no ONNX here.

Other rooms take ``Checkpoint``, ``read_modules`` (how texts become vectors), ``read_tokenizer``,
``image_settings`` and the hashes of ``fingerprint``.
"""
