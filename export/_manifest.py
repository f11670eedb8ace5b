"""The manifest and the model card of an export."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from math import lcm
from typing import Any

from embedge.export._model import Model
from embedge.runtime._manifest import FORMAT_VERSION, Manifest
from embedge.runtime._manifest import Model as ManifestModel


def manifest_of(
    model: Model,
    *,
    matryoshka_dims: tuple[int, ...] | None,
    precisions: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, Any],
    old: Manifest | None,
) -> Manifest:
    """The manifest after an export, tasks and precisions of ``old`` included."""
    settings = model.settings
    tasks: dict[str, Any] = {t: v.to_dict() for t, v in old.tasks.items()} if old else {}
    for task, bound in model.adapters.items():
        tasks[task] = {
            "prompts": model.prompts(task),
            "default_prompt": settings.default_prompt_name,
            "adapter": None
            if bound is None
            else {
                "name": bound.adapter.name,
                "sha256": bound.adapter.sha256,
                "base_model": bound.adapter.base_model,
            },
        }
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
                "license": model.checkpoint.license,
                "sha256": model.checkpoint.sha256(),
                "graph_sha256": model.graph_sha256(),
                "dense_sha256": model.dense_sha256(),
            },
            "model": model_section(model, matryoshka_dims),
            "tokenizer": {
                "file": "tokenizer.json",
                "pad_token_id": model.tokenizer.pad_token_id,
                "append_eos_token_id": None,
                "truncation_side": model.tokenizer.truncation_side,
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
        "pooling": model.pooling,
        "normalize": model.settings.normalize,
        "max_length": model.settings.max_length,
        "matryoshka_dims": list(matryoshka_dims) if matryoshka_dims else None,
        "truncate_dim": model.truncate_dim,
        "multi_vector_dim": model.family.multi_vector_dim,
        "modalities": model.modalities,
        "inputs": list(model.family.inputs),
        "similarity": model.settings.similarity,
        "image": model.image,
    }


def _joined(before: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A precision's entry after tasks were added, safe for the old and the new graphs."""
    joined = {**before, **new}
    for key in ("graphs", "layers", "fidelity", "activation_constants", "unpack"):
        joined[key] = {**before.get(key, {}), **new.get(key, {})}
    joined["devices"] = [d for d in before["devices"] if d in new["devices"]]
    joined["row_multiple"] = lcm(before.get("row_multiple", 1), new["row_multiple"])
    options = dict(before.get("options", {}))
    by_task = dict(options.pop("by_task", {}))
    if options != new["options"]:
        by_task |= dict.fromkeys(new["graphs"], new["options"])
    joined["options"] = {**options, "by_task": by_task} if by_task else options
    return joined


def model_card(manifest: Manifest) -> str:
    """The bundle's README.md. Between the markers ``embedge bench --record`` writes its table."""
    source, model = manifest.source, manifest.model
    licence = source.license or "not stated by the source"
    tasks = "\n".join(
        f"| {name} | {_adapter(task)} | {', '.join(sorted(task.prompts)) or 'none'} |"
        for name, task in manifest.tasks.items()
    )
    sizes = "\n".join(
        f"| {name} | {', '.join(p.graphs)} | {manifest.folder_bytes(name) / 1e6:.1f} |"
        for name, p in manifest.precisions.items()
    )
    dims, cut = model.matryoshka_dims, model.truncate_dim
    default = f"; {cut} where a call names none" if cut else ""
    first_task, first_precision = next(iter(manifest.tasks)), next(iter(manifest.precisions))
    front = f"---\nlicense: {source.license}\n---\n\n" if source.license else ""
    return f"""{front}# {source.name}, as ONNX graphs per task

{_embeds(model)} of {model.dim} dimensions, {model.pooling} pooling, texts of up to {model.max_length} tokens.
Exported from {source.name} ({source.model_type}). Licence of the weights: {licence}.
Dimensions to truncate to: {", ".join(map(str, dims)) if dims else f"any up to {model.dim}"}{default}.

| task | adapter | prompts |
|---|---|---|
{tasks}

| precision | tasks | MB |
|---|---|---|
{sizes}

```python
from embedge.runtime import Embedder

model = Embedder("path/to/this/folder", precision="{first_precision}")
vectors = model.encode(["a text", "another text"], task="{first_task}")
```

<!-- embedge:bench:start -->
Quality, latency and memory are measured by `embedge bench BUNDLE --reference MODEL --record`.
<!-- embedge:bench:end -->
"""


def _embeds(model: ManifestModel) -> str:
    kinds = "Embeddings of texts and images" if "image" in model.modalities else "Text embeddings"
    if model.multi_vector_dim is not None:
        return f"{kinds}, also multi-vectors of {model.multi_vector_dim} dimensions a token,"
    return kinds


def _adapter(task: Any) -> str:
    return "none (bare backbone)" if task.adapter is None else f"LoRA {task.adapter.name}, merged"
