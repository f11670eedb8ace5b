"""The manifest of an export."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from math import lcm
from typing import Any

from embedge.export.model import Model
from embedge.runtime.bundle.contract import FORMAT_VERSION
from embedge.runtime.bundle.manifest import BaseQuantization, Manifest


def base_quantization(model: Model) -> BaseQuantization | None:
    """What the manifest says of how the base was quantized, ``None`` where it was not."""
    how = model.checkpoint.quantization
    return None if how is None else BaseQuantization.parse(how.to_dict())


def manifest_of(
    model: Model,
    *,
    matryoshka_dims: tuple[int, ...] | None,
    precisions: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, Any],
    old: Manifest | None,
) -> Manifest:
    """The manifest after an export, tasks and precisions of ``old`` included."""
    tasks: dict[str, Any] = {t: v.to_dict() for t, v in old.tasks.items()} if old else {}
    for task, bound in model.adapters.items():
        tasks[task] = {
            "prompts": model.prompts(task),
            "default_prompt": model.default_prompt(task),
            "adapter": None
            if bound is None
            else {
                "name": bound.adapter.name,
                "sha256": bound.adapter.sha256,
                "base_model": bound.adapter.base_model,
                "license": bound.adapter.license,
                "own_prompts": task in model.settings.task_defaults,
            },
        }
    quantization = base_quantization(model)
    special_ids = [] if model.settings.include_prompt else model.tokenizer.special_ids
    merged = {p: v.to_dict() for p, v in old.precisions.items()} if old else {}
    for name, value in precisions.items():
        merged[name] = _joined(merged[name], value) if name in merged else dict(value)
    return Manifest.from_dict(
        {
            "format_version": FORMAT_VERSION,
            "producer": {"name": "embedge", "version": metadata.version("embedge")},
            "source": {
                "name": model.checkpoint.name,
                "model_type": model.family.config["model_type"],
                "license": model.checkpoint.card.license,
                "hub_id": model.checkpoint.hub_id or (old.source.hub_id if old else None),
                "sha256": model.checkpoint.sha256(),
                "graph_sha256": model.graph_sha256,
                "dense_sha256": model.dense_sha256(),
                "base_quantization": None if quantization is None else quantization.to_dict(),
            },
            "model": model_section(model, matryoshka_dims),
            "tokenizer": {
                "file": "tokenizer.json",
                "pad_token_id": model.tokenizer.pad_token_id,
                "append_eos_token_id": None,
                "truncation_side": model.tokenizer.truncation_side,
                "table_rows": model.tokenizer.table_rows,
                "special_token_ids": special_ids,
            },
            "tasks": tasks,
            "precisions": merged,
            "files": dict(files),
        }
    )


def model_section(model: Model, matryoshka_dims: tuple[int, ...] | None) -> dict[str, Any]:
    """The manifest's ``model``."""
    return {
        "dim": model.dim,
        "pooling": model.pooling or "none",
        "normalize": model.settings.normalize,
        "max_length": model.settings.max_length,
        "matryoshka_dims": list(matryoshka_dims) if matryoshka_dims else None,
        "truncate_dim": model.truncate_dim,
        "multi_vector_dim": model.multi_vector_dim,
        "modalities": model.modalities,
        "inputs": list(model.architecture.inputs),
        "similarity": model.settings.similarity,
        "image": model.image,
        "include_prompt": model.settings.include_prompt,
        "late_interaction": model.late_interaction,
    }


def _joined(before: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A precision's entry after tasks were added, safe for the old and the new graphs."""
    joined = {**before, **new}
    by_name = ("graphs", "layers", "fidelity", "activation_constants", "unpack", "content_sha256")
    for key in (*by_name, "task_tensors"):
        joined[key] = {**before.get(key, {}), **new.get(key, {})}
    joined["devices"] = [d for d in before["devices"] if d in new["devices"]]
    joined["row_multiple"] = lcm(before.get("row_multiple", 1), new["row_multiple"])
    options = dict(before.get("options", {}))
    by_task = dict(options.pop("by_task", {}))
    if options != new["options"]:
        by_task |= dict.fromkeys(new["graphs"], new["options"])
    joined["options"] = {**options, "by_task": by_task} if by_task else options
    return joined
