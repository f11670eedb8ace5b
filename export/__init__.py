"""Export an embedding model with task LoRAs as one quantized ONNX graph per task.

>>> from embedge.export import export_bundle
>>> export_bundle("all-MiniLM-L6-v2", adapters={"code": "adapters/code"}, out="bundle")
"""

from embedge.export.requirements import check_requirements

check_requirements()

from embedge.export.api import export_bundle  # noqa: E402 - needs what was just checked
from embedge.export.errors import AdapterError, CheckpointError, ExportError  # noqa: E402

__all__ = ["AdapterError", "CheckpointError", "ExportError", "export_bundle"]
