"""Writing ONNX graphs: the builder, attention, rotary tables, and a task's whole graph."""
