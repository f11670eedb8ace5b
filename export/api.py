"""The public call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from embedge.export.options import ExportOptions
from embedge.export.pipeline import export
from embedge.export.progress import Progress


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
    portable: bool = False,
    layout: str = "merged",
    branch_rank: int | None = None,
    budget: int | str | None = None,
    base_quantization: str | None = None,
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
        int8_method: the same for int8; ``None``: "gptq" below a hidden size of 1536, where it takes a
            fifth to a half of the error away, else "rtn".
        portable: choose 8-bit weights of which no two products exceed 16 bits together. Any session of ONNX
            Runtime computes them exactly then, on x86-64 without VNNI too; weights keep half a bit less.
            Other graphs that hold 8-bit products stop there, unless the session's option
            ``session.x64quantprecision`` is "1", as embedge sets it.
        layout: "merged", a graph for each task with its adapter in the weights; or "shared", one graph of the
            quantized backbone, and for each task low-rank branches that hold its adapter and what
            quantization lost. For int8 and int4. Tasks that are added later leave the others as they are.
        branch_rank: columns of each branch, a multiple of 16. ``None``: with "shared" 16 at int8 below a hidden
            size of 512 and 32 from there on, three times that at int4, and more where that holds the adapters of
            all Linears of an input; no branches with "merged". A higher rank is closer and larger.
        budget: most bytes of a task's tensors at int4, "2.0GB" for example: the layers whose 4
            bits cost the vectors most per byte get 8, as far as it goes. ``None``: 4 bits everywhere.
        base_quantization: how bitsandbytes had quantized the base when the adapters were trained on it (QLoRA):
            "nf4", "fp4" or "int8", after which may stand "double_quant", "block_size=64", "dtype=bfloat16" (in
            which the base was loaded; else the one that its config.json or its weights have) and
            "skip=lm_head+NAME" (``llm_int8_skip_modules``), as in "nf4,double_quant,dtype=float16". Adapters
            are merged into the base as they saw it. ``None``: they were trained on the weights as stored.
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
    arguments = dict(locals())  # all of those above
    del arguments["progress"]
    return export(ExportOptions(**arguments), Progress(show=progress))
