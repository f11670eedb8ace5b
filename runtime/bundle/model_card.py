"""The bundle's README.md: what it holds, and how it runs here and with other runtimes.

It is made from the manifest alone. Between two markers ``embedge bench --record`` writes its table. A card
ends with a hash of all else, so that one in which somebody has written is known, and left alone, when the
bundle changes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable

from embedge.runtime.bundle.licences import described_licences
from embedge.runtime.bundle.manifest import Manifest, Model, Task
from embedge.runtime.bundle.model_card_other_runtimes import other_runtimes

__all__ = ["BENCH_END", "BENCH_START", "licence_lines", "model_card", "renewed_card"]

BENCH_START = "<!-- embedge:bench:start -->"
BENCH_END = "<!-- embedge:bench:end -->"
_UNMEASURED = (
    "Quality, latency and memory are measured by `embedge bench BUNDLE --reference MODEL --record`."
)
_TAGS = ("onnx", "embedge", "embeddings", "sentence-similarity", "quantized")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PLAIN = re.compile(r"[A-Za-z0-9][\w.+-]*")
_SIGNED = re.compile("(.*)\n<!-- embedge:card:([0-9a-f]{16}) -->\n", re.DOTALL)


def model_card(manifest: Manifest) -> str:
    """The card of a bundle that was not measured yet."""
    parts = [
        _front_matter(manifest),
        f"# {manifest.source.name}, as ONNX graphs per task",
        _about(manifest),
        _tasks(manifest),
        _precisions(manifest),
        _with_embedge(manifest),
        f"{BENCH_START}\n{_UNMEASURED}\n{BENCH_END}",
        *other_runtimes(manifest),
    ]
    text = "\n\n".join(parts) + "\n"
    return f"{text}\n<!-- embedge:card:{_hash(*_around(text))} -->\n"


def renewed_card(card: str, manifest: Manifest) -> str | None:
    """A card after its bundle has changed, with its measurements.

    Args:
        card: as it is.
        manifest: of the bundle now.

    Returns:
        ``None`` where somebody else has written in the card, or an earlier embedge wrote it.
    """
    found = _SIGNED.fullmatch(card)
    if found is None or found[2] != _hash(*_around(found[1])):
        return None
    start, end = _around(model_card(manifest))
    before, behind = _around(found[1])
    return start + found[1][len(before) : len(found[1]) - len(behind)] + end


def _around(text: str) -> tuple[str, str]:
    """What stands before and behind the measurements, the markers left out; all and nothing without."""
    start, end = text.find(BENCH_START), text.rfind(BENCH_END)
    if not 0 <= start < end:
        return text, ""
    return text[: start + len(BENCH_START)], text[end:]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _front_matter(manifest: Manifest) -> str:
    """What the hub reads."""
    lines = ["library_name: embedge", "pipeline_tag: feature-extraction", "tags:"]
    lines += [f"- {tag}" for tag in _TAGS]
    if any(task.adapter is not None for task in manifest.tasks.values()):
        lines.append("- lora")
    lines = [*licence_lines(manifest, manifest.tasks), *lines]
    base = _base_model(manifest)
    if base is not None:
        lines.append(f"base_model: {_yaml(base)}")
    return "\n".join(["---", *lines, "---"])


def licence_lines(manifest: Manifest, tasks: Iterable[str]) -> list[str]:
    """The front matter's lines on licences that the model or the adapters of some tasks state; none where none does."""
    licences = _licences(manifest, [manifest.tasks[name] for name in tasks])
    if len(licences) > 1:
        return ["license:", *(f"- {_yaml(name)}" for name in licences)]
    return [f"license: {_yaml(name)}" for name in licences]


def _licences(manifest: Manifest, tasks: Iterable[Task]) -> list[str]:
    """Identifiers of the licences that the model or an adapter states, each once."""
    adapters = (task.adapter.license for task in tasks if task.adapter)
    stated = [text for text in (manifest.source.license, *adapters) if text]
    names = (name.strip() for text in stated for name in text.split(","))
    return list(dict.fromkeys(name for name in names if name))


def _base_model(manifest: Manifest) -> str | None:
    """The source's id on the hub, where the export knew it or an adapter says it."""
    if manifest.source.hub_id is not None:
        return manifest.source.hub_id
    named = (task.adapter.base_model for task in manifest.tasks.values() if task.adapter)
    own = manifest.source.name.lower()
    fitting = (n for n in named if n and _HUB_NAME.fullmatch(n) and n.lower().endswith(f"/{own}"))
    return next(fitting, None)


def _yaml(text: str) -> str:
    plain = all(_PLAIN.fullmatch(part) for part in text.split("/"))
    return text if plain else json.dumps(text, ensure_ascii=False)


def _about(manifest: Manifest) -> str:
    source, model = manifest.source, manifest.model
    dims, cut = model.matryoshka_dims, model.truncate_dim
    default = f"; {cut} where a call names none" if cut else ""
    stated = {
        name: task.adapter.license
        for name, task in manifest.tasks.items()
        if task.adapter is not None and task.adapter.license is not None
    }
    pooled = f"{_embeds(model)} of {model.dim} dimensions, {model.pooling} pooling"
    if model.late_interaction is not None:
        pooled = f"Late interaction: a vector of {model.dim} dimensions a token, scored by {model.similarity}"
    about = (
        f"{pooled}, texts of up to {model.max_length} tokens.\n"
        f"Exported from {source.name} ({source.model_type}). "
        f"Licence of the weights: {described_licences(source.license, stated)}."
    )
    if source.base_quantization is not None:
        about += (
            "\nIts Linears were quantized as bitsandbytes does it before adapters were merged into them, which were "
            f"trained so: {source.base_quantization}."
        )
    if model.late_interaction is not None:
        return about
    return (
        f"{about}\n"
        f"Dimensions to truncate to: {', '.join(map(str, dims)) if dims else f'any up to {model.dim}'}"
        f"{default}."
    )


def _embeds(model: Model) -> str:
    kinds = "Embeddings of texts and images" if "image" in model.modalities else "Text embeddings"
    if model.multi_vector_dim is not None:
        return f"{kinds}, also multi-vectors of {model.multi_vector_dim} dimensions a token,"
    return kinds


def _tasks(manifest: Manifest) -> str:
    rows = [
        f"| {name} | {_adapter(task)} | {_prompts(task)} |" for name, task in manifest.tasks.items()
    ]
    head = "prompts (* where a call names none)" if _has_default(manifest) else "prompts"
    return "\n".join([f"| task | adapter | {head} |", "|---|---|---|", *rows])


def _has_default(manifest: Manifest) -> bool:
    return any(task.default_prompt is not None for task in manifest.tasks.values())


def _prompts(task: Task) -> str:
    """A task's prompts with their texts, as code in a table."""
    return (
        ", ".join(
            f"{name}{'*' if name == task.default_prompt else ''} `{_code(text)}`"
            for name, text in sorted(task.prompts.items())
        )
        or "none"
    )


def _code(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("`", "\\u0060").replace("|", "\\u007c")


def _adapter(task: Task) -> str:
    return "none (bare backbone)" if task.adapter is None else f"LoRA {task.adapter.name}, merged"


def _precisions(manifest: Manifest) -> str:
    rows = [
        f"| {name} | {', '.join(p.graphs)} | {manifest.folder_bytes(name) / 1e6:.1f} |"
        for name, p in manifest.precisions.items()
    ]
    return "\n".join(["| precision | tasks | MB |", "|---|---|---|", *rows])


def _with_embedge(manifest: Manifest) -> str:
    precision, task = next(iter(manifest.precisions)), next(iter(manifest.tasks))
    if manifest.model.late_interaction is not None:
        return _of_tokens(precision, task)
    cut = min(manifest.model.matryoshka_dims or (manifest.model.dim,))
    shorter = (
        f"""
shorter = model.encode(["a text"], truncate_dim={cut})
print(shorter.shape)  # (1, {cut})"""
        if cut < manifest.model.dim
        else ""
    )
    return f"""```python
from embedge import Embedder

model = Embedder("path/to/this/folder", precision="{precision}", task="{task}")
queries = model.encode_query(["a question"])
documents = model.encode_document(["a text", "another text"])
print(model.similarity(queries, documents))  # float32 [1, 2]
print(model.fingerprint(role="document"))  # store it beside an index{shorter}
```"""


def _of_tokens(precision: str, task: str) -> str:
    return f"""```python
from embedge import Embedder

model = Embedder("path/to/this/folder", precision="{precision}", task="{task}")
queries = model.encode_query(["a question"], multi_vector=True)
documents = model.encode_document(["a text", "another text"], multi_vector=True)
print(model.similarity(queries, documents))  # float32 [1, 2]
print(model.fingerprint(role="document", multi_vector=True))  # store it beside an index
```"""
