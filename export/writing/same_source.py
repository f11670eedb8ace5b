"""Whether a bundle's vectors come from the model that an export reads now.

All of a bundle comes from one source. What its vectors depend on is in the manifest: the hash of the
weights, what the model section says, the tokenizer's file, prompts, adapters, the Dense layers, and the hash
of the unquantized graph without its weights, which is all that config.json decides: heads, rotary
tables, norms, activations, windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from embedge.export.model import Model
from embedge.export.writing.manifest import base_quantization, model_section
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.bundle.manifest import Model as ManifestModel
from embedge.runtime.bundle.schema import Record
from embedge.runtime.errors import EmbedgeValueError

__all__ = ["check_same_source"]

_BY_MODALITY = ("inputs", "image")
_LABELS = {"matryoshka_dims": "matryoshka dimensions", "truncate_dim": "truncate_dim"}


def check_same_source(out: Path, model: Model, dims: tuple[int, ...] | None, old: Manifest) -> None:
    """Refuse to add to a bundle what would not fit the rest of it.

    Args:
        out: the bundle.
        model: what the export reads.
        dims: dimensions to truncate to that it asks for, ``None``: those of the bundle.
        old: the bundle's manifest.

    Raises:
        EmbedgeValueError: naming everything that differs.
    """
    found = list(_differences(model, dims, old)) or list(_other_graph(model, old))
    if found:
        raise EmbedgeValueError(
            f"{out}: {'; '.join(found)}. All tasks and precisions of a bundle come from one source: "
            "choose another --out, or --overwrite to replace it"
        )
    for task, bound in model.adapters.items():
        there = old.tasks[task].adapter if task in old.tasks else None
        if task in old.tasks and (there.sha256 if there else None) != (
            bound.adapter.sha256 if bound else None
        ):
            raise EmbedgeValueError(
                f"{out}: already has a task {task} made from another adapter; "
                "give the new one another name, or --overwrite the bundle"
            )


def _differences(model: Model, dims: tuple[int, ...] | None, old: Manifest) -> Iterator[str]:
    """What differs and can be named, one phrase each."""
    name = model.checkpoint.name
    if old.source.sha256 != model.checkpoint.sha256():
        yield f"is a bundle of {old.source.name} with other weights than {name}"
    before, now = old.source.base_quantization, base_quantization(model)
    if before != now:
        asked = [f"quantized as {how}" if how else "not quantized" for how in (before, now)]
        yield f"has adapters merged into a base {asked[0]} (--base-quantization), this export into one {asked[1]}"
    section = model_section(model, dims or old.model.matryoshka_dims)
    model_before, model_now = old.model, ManifestModel.parse(section)
    same_modalities = model_before.modalities == model_now.modalities
    for key in section:
        one, other = getattr(model_before, key), getattr(model_now, key)
        if one != other and (same_modalities or key not in _BY_MODALITY):
            label = _LABELS.get(key, key.replace("_", " "))
            yield f"has {label} {_shown(one)}, this export {_shown(other)}"
    tokenizer = hashlib.sha256(model.tokenizer.text.encode()).hexdigest()
    if tokenizer != old.files[old.tokenizer.file].sha256:
        yield f"its tokenizer.json is another than that of {name} now"
    if model.tokenizer.pad_token_id != old.tokenizer.pad_token_id:
        yield (
            f"has the padding token {old.tokenizer.pad_token_id}, this export "
            f"{model.tokenizer.pad_token_id}"
        )
    if model.tokenizer.truncation_side != old.tokenizer.truncation_side:
        yield (
            f"has truncation side {old.tokenizer.truncation_side}, this export "
            f"{model.tokenizer.truncation_side}"
        )
    for task, settings in old.tasks.items():
        if settings.adapter and settings.adapter.own_prompts and task not in model.adapters:
            continue  # they came with an adapter that is not read now
        prompts, default = model.prompts(task), model.default_prompt(task)
        if (dict(settings.prompts), settings.default_prompt) != (prompts, default):
            both = {*settings.prompts, *prompts}
            names = sorted(n for n in both if settings.prompts.get(n) != prompts.get(n))
            what = f"prompts {', '.join(names)}" if names else "default prompt"
            yield f"its task {task} has other {what} than {name} now"
            break  # mostly all tasks have the same
    if old.source.graph_sha256 is not None and old.source.dense_sha256 != model.dense_sha256():
        yield f"its Dense layers are others than those of {name} now"


def _shown(value: object) -> object:
    """A member as JSON has it."""
    if isinstance(value, Record):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _other_graph(model: Model, old: Manifest) -> Iterator[str]:
    """Whether the source computes something else from the same weights, for a reason not named yet."""
    if old.source.graph_sha256 is None:
        yield (
            "expected the hash of its unquantized graph in the manifest, found none: an earlier embedge "
            "wrote it, and whether the source is still the same cannot be told"
        )
    elif old.source.graph_sha256 != model.graph_sha256:
        version = metadata.version("embedge")
        older = old.producer.version != version
        yield (
            f"{model.checkpoint.name} now computes something else from the same weights: its config.json "
            "says other heads, positions, norms, activations or windows"
            + (
                f", or embedge {old.producer.version} wrote its graph in another way than {version}"
                if older
                else ""
            )
        )
