"""Sessions of ONNX Runtime: opened (session), owned and bounded (pool), run in batches (session_workers).

graphs is what other rooms use: the graphs of one precision of a bundle, by name.
"""
