"""Export an embedding model with task LoRAs as one quantized ONNX graph per task.

    from embedge.export import export_bundle

    adapters = {"code": "adapters/code"}
    export_bundle("path/to/model", adapters=adapters, precisions=["int8", "int4"], out="bundle")

Importing it needs the packages of the ``export`` extra.
"""

from embedge.export.requirements import check_requirements

check_requirements()

from embedge.export.api import export_bundle  # noqa: E402 - needs what was just checked
from embedge.export.errors import AdapterError, CheckpointError, ExportError  # noqa: E402
from embedge.export.task_maps import fit_maps  # noqa: E402
from embedge.export.writing.pretrained_folder import save_pretrained  # noqa: E402

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ExportError",
    "export_bundle",
    "fit_maps",
    "save_pretrained",
]
