"""The public call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from embedge.export.options import (
    METHODS,
    MODALITIES,
    POOLINGS,
    Request,
    check_keep,
    check_mapping,
    check_path,
    check_precisions,
    check_tasks,
)
from embedge.export.pipeline import export
from embedge.export.progress import Progress
from embedge.runtime.arguments import parse_bytes
from embedge.runtime.errors import EmbedgeValueError


def export_bundle(
    source: str | Path,
    *,
    adapters: Mapping[str, str | Path | None] | None = None,
    precisions: Sequence[str] = ("int8",),
    out: str | Path,
    modality: str = "all",
    matryoshka_dims: Sequence[int] | None = None,
    pooling: str | None = None,
    calibration: str | Path = "default",
    keep: Mapping[str, str] | None = None,
    int4_block_size: int | None = None,
    int4_method: str = "gptq",
    int8_method: str | None = None,
    budget: int | str | None = None,
    overwrite: bool = False,
    progress: bool | None = False,
) -> Path:
    """Write a bundle: one ONNX graph per task and precision, with what tasks share stored once.

    Weights are read, merged, quantized and written one tensor at a time; memory stays near that of the
    largest layer. Two calls with the same input write identical bytes. Nothing appears at ``out``
    unless the whole export succeeded.

    Args:
        source: folder of a transformers or sentence-transformers model, or its hub id.
        adapters: folder of a PEFT LoRA adapter by task name (``FOLDER`` itself, or ``FOLDER/NAME``);
            ``None`` exports the bare backbone as that task. Without any, the tasks that the model is
            published with (jina-embeddings-v4).
        precisions: some of "fp32", "int8" and "int4" for CPUs, "fp16" and "int4-fp16" for CUDA.
        out: the bundle's folder. An existing bundle of the same source gains what it lacks.
        modality: "all", or "text" to leave a vision tower out.
        matryoshka_dims: dimensions callers may truncate to; ``None``: those the model declares, or any.
        pooling: "mean", "cls" or "lasttoken"; ``None``: what the source says.
        calibration: file of calibration texts (a text per line, or JSON lines with ``text``),
            "default" for the neutral set of the package, "none" for the data-free methods.
        keep: "fp32" or "int8" by shell-style pattern of layer names, for layers that int8 or int4
            would hurt, e.g. ``{"encoder.layer.0.*": "fp32"}``.
        int4_block_size: input channels that share a scale at int4: 16, 32, 64, 128 or 256; ``None``: 32,
            or 128 from a hidden size of 1536 on, where that is 1.8 times as fast as 32 and nearly as close.
        int4_method: "gptq" rounds with the calibration texts' activations; "rtn" rounds every weight
            to nearest on an error-minimising grid, several times faster and less exact.
        int8_method: the same for int8; ``None``: "gptq" for decoders and ModernBERT up to a hidden
            size of 1536, where it takes a fifth to a half of the error away,
            else "rtn".
        budget: most bytes of a task's tensors at int4, "2.0GB" for example: the layers whose 4
            bits cost the vectors most per byte get 8, as far as it goes. ``None``: 4 bits everywhere.
        overwrite: replace an existing bundle.
        progress: draw progress bars on stderr; ``None``: only on a terminal.

    Returns:
        ``out`` as a path.

    Raises:
        EmbedgeValueError: a bad argument, or an ``out`` that cannot be added to.
        CheckpointError: the source is missing, damaged or of an unsupported architecture.
        AdapterError: an adapter is of an unsupported kind or does not fit; lists all that does not.
        ExportError: writing failed, the disk is full for example.
    """
    request = make_request(
        source,
        adapters=adapters,
        precisions=precisions,
        out=out,
        matryoshka_dims=matryoshka_dims,
        pooling=pooling,
        calibration=calibration,
        keep=keep,
        int4_block_size=int4_block_size,
        int4_method=int4_method,
        int8_method=int8_method,
        budget=budget,
        overwrite=overwrite,
        modality=modality,
    )
    return export(request, Progress(show=progress))


def make_request(
    source: str | Path,
    *,
    adapters: Mapping[str, str | Path | None] | None,
    precisions: Sequence[str],
    out: str | Path,
    matryoshka_dims: Sequence[int] | None,
    pooling: str | None,
    calibration: str | Path,
    keep: Mapping[str, str] | None,
    int4_block_size: int | None,
    int4_method: str,
    int8_method: str | None,
    budget: int | str | None,
    overwrite: bool,
    modality: str,
) -> Request:
    """Check the arguments of :func:`export_bundle` that need no file."""
    adapters = {} if adapters is None else adapters
    check_mapping("adapters", adapters, "{'task': 'adapter folder'} or {'task': None}")
    check_tasks(adapters)
    keep = {} if keep is None else keep
    check_mapping("keep", keep, "{'pattern of layers': 'fp32'} or 'int8'")
    if matryoshka_dims is not None and (
        isinstance(matryoshka_dims, str) or not isinstance(matryoshka_dims, Iterable)
    ):
        raise EmbedgeValueError(
            f"matryoshka_dims: expected a list of integers, found {matryoshka_dims!r}"
        )
    if modality not in MODALITIES:
        raise EmbedgeValueError(f"modality {modality!r}: expected one of {', '.join(MODALITIES)}")
    check_path("source", source)  # or a hub id, which is kept as it is written
    precisions = check_precisions(precisions)
    check_keep(keep, precisions)
    if pooling is not None and pooling not in POOLINGS:
        raise EmbedgeValueError(f"pooling {pooling!r}: expected one of {', '.join(POOLINGS)}")
    if int4_block_size not in (None, 16, 32, 64, 128, 256):
        raise EmbedgeValueError(
            f"int4_block_size {int4_block_size!r}: expected 16, 32, 64, 128 or 256"
        )
    for name, method in (("int4_method", int4_method), ("int8_method", int8_method or "rtn")):
        if method not in METHODS:
            raise EmbedgeValueError(f"{name} {method!r}: expected one of {', '.join(METHODS)}")
    if budget is not None and ("int4" not in precisions or calibration == "none"):
        raise EmbedgeValueError(
            f"budget {budget!r}: it chooses between 4 and 8 bits by calibration; add int4 to the precisions "
            "and leave the calibration texts on"
        )
    return Request(
        source=str(source),
        adapters={
            name: None if folder is None else check_path(f"adapters[{name!r}]", folder)
            for name, folder in adapters.items()
        },
        precisions=precisions,
        out=check_path("out", out),
        matryoshka_dims=None if matryoshka_dims is None else tuple(matryoshka_dims),
        pooling=pooling,
        calibration=calibration
        if calibration in ("default", "none")
        else check_path("calibration", calibration),
        keep=dict(keep),
        int4_block_size=int4_block_size,
        int4_method=int4_method,
        int8_method=int8_method,
        budget=None if budget is None else parse_bytes("budget", budget),
        overwrite=overwrite,
        modality=modality,
    )
