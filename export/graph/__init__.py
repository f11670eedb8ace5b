"""Writing ONNX graphs: ``Graph``, over nodes, values and initializers; a transformer from its declaration.

How a precision stores and runs weights is asked of a ``Scheme``; nothing here knows which there are.
"""
