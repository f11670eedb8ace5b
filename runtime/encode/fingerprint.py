"""What kind a vector is of, as a short string that an index stores beside its vectors.

A fingerprint is ``e1:`` and the first 16 hexadecimal digits of the SHA-256 of its parts. Those are what decides a
vector besides its text: written as JSON, keys sorted, without spaces, other letters than ASCII escaped. ``model`` and
``task`` are names for people and do not count.

The parts:
    model, task     names, not hashed
    graph           what the task's graph computes: operators, weights with the adapter, pooling, normalization
                    (:mod:`embedge.runtime.bundle.content`)
    vision          likewise the vision tower's; ``None`` where the bundle takes no images
    tokenizer       SHA-256 of the tokenizer's file
    tokens          the manifest's other settings of the tokenizer, but for defaults and padding
    precision       "int8", "int4", …
    numerics        the class of arithmetic on this machine (:mod:`embedge.runtime.kernels.numerics`)
    pooling         as the manifest has it
    settings        the manifest's settings of the model that have no part of their own, but for defaults
    output          "embedding", "token_embeddings" with ``multi_vector``, or "embeddings[N]" of maps, N the task's row
    dim             length of a vector
    normalized      whether it is of length 1
    max_length      most tokens of a text
    prompt          the text before every text
    role            with late interaction alone: "query", "document" or ``None``
    format          with another ``output_format`` than "float32" alone: its name
    ranges          with it: SHA-256 of the ranges of 8-bit codes, float32 ``[2, dim]``; else ``None``
    pool_factor     where the vectors of tokens are joined: by which factor

Settings that a later version of the format adds have defaults, which older bundles have: their fingerprints stay.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any

from embedge.runtime.bundle.contract import VISION
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.encode.request import MappedRequest, Request
from embedge.runtime.encode.vectors import output_name
from embedge.runtime.errors import EmbedgeValueError, FingerprintError
from embedge.runtime.kernels.numerics import CLASSES, numerics_class
from embedge.runtime.scoring.quantization import OUTPUT_FORMATS

__all__ = ["Parts", "check_fingerprint", "described", "fingerprint_of", "others_of", "parts_of"]

Parts = dict[str, Any]

_FORM = re.compile(r"e([0-9]+):([0-9a-f]{16})")
_VERSION = "1"
_NAMES = ("model", "task")  # for people
# Of the manifest's model: what has a part of its own, and what no vector depends on.
_APART = {"dim", "pooling", "normalize", "max_length", "truncate_dim", "multi_vector_dim"}
_NO_VECTOR = {"matryoshka_dims", "similarity", "inputs", "modalities"}


def parts_of(
    bundle: Bundle, manifest: Manifest, precision: str, device: str, request: Request
) -> Parts:
    """The parts of the vectors that a call gives.

    Args:
        bundle: the bundle.
        manifest: its manifest, with the prompts of whoever opened it.
        precision: the one that is open.
        device: what runs the graphs.
        request: the call.

    Raises:
        BundleError: a graph of a bundle of before 1.5 cannot be read.
    """
    model, tokenizer = manifest.model, manifest.tokenizer
    settings = manifest.precisions[precision]
    integers = bundle.multiplies_integers(precision)
    attention = integers and bundle.has_attention_function(precision, request.task)
    late = model.late_interaction is not None
    role = {"role": request.options.role} if late else {}
    factor = request.options.pool_factor
    output = output_name(request)
    if isinstance(request, MappedRequest):  # of one task
        [(row, of_task)] = request.by_row.items()
        output, task = f"{output}[{row}]", of_task.task
    else:
        task = request.task
    pooled = {"pool_factor": float(factor)} if factor > 1 else {}
    return (
        role
        | request.output.parts()
        | pooled
        | {
            "model": manifest.source.name,
            "task": task,
            "graph": bundle.content_sha256(precision, request.task),
            "vision": bundle.content_sha256(precision, VISION) if settings.vision else None,
            "tokenizer": manifest.files[tokenizer.file].sha256,
            "tokens": _without(tokenizer.changed(), {"file", "pad_token_id"}),
            "precision": precision,
            "numerics": numerics_class(device=device, integers=integers, attention=attention),
            "pooling": model.pooling,
            "settings": _without(model.changed(), _APART | _NO_VECTOR),
            "output": output,
            "dim": request.dim,
            "normalized": model.normalize or request.options.normalize_embeddings,
            "max_length": model.max_length,
            "prompt": request.prefix,
        }
    )


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    """The fingerprint of some parts: ``e1:0123456789abcdef``."""
    counted = {name: value for name, value in parts.items() if name not in _NAMES}
    text = json.dumps(counted, sort_keys=True, separators=(",", ":"))
    return f"e{_VERSION}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def described(parts: Parts) -> dict[str, Any]:
    """A fingerprint and its parts, as files have them: ``{"fingerprint": "e1:…", "parts": {…}}``."""
    return {"fingerprint": fingerprint_of(parts), "parts": parts}


def check_fingerprint(
    stored: str | Mapping[str, Any], parts: Parts, others: Iterable[Parts]
) -> None:
    """Refuse vectors that are of another kind than those that were stored.

    Args:
        stored: a fingerprint, its parts, or both as :func:`described` has them.
        parts: of the vectors here.
        others: of other vectors that may have been stored.

    Raises:
        EmbedgeValueError: ``stored`` is no fingerprint.
        FingerprintError: naming the parts that differ, as far as that is known.
    """
    here = fingerprint_of(parts)
    if isinstance(stored, Mapping):
        given = _parts_in(stored)
        found: Parts | None = given
        there = fingerprint_of(given)
    else:
        there = _checked(stored)
        found = next((other for other in others if fingerprint_of(other) == there), None)
    if there == here:
        return
    if found is None:
        raise FingerprintError(
            f"expected vectors of the fingerprint {there}, found {here}, which differs in more than this bundle "
            "can tell: another model, other weights, another tokenizer or a text of your own as the prompt; store "
            "fingerprint_parts() too, which tells; embed everything anew, or open the bundle that the stored "
            "vectors are from"
        )
    told = [name for name in {**parts, **found} if found.get(name) != parts.get(name)]
    differing = [name for name in told if name not in _NAMES]
    raise FingerprintError(
        f"expected vectors of the fingerprint {there}, found {here}; "
        + "; ".join(
            f"{name}: {_shown(found.get(name))} stored, {_shown(parts.get(name))} here"
            for name in told
        )
        + "; open the bundle and call it as the stored vectors were made, or embed everything anew",
        differing,
    )


def others_of(manifest: Manifest, parts: Parts) -> Iterator[Parts]:
    """Parts of what else the bundle gives: other tasks, precisions, machines, lengths and prompts."""
    model = manifest.model
    yield from (parts | {"dim": dim} for dim in range(1, model.dim + 1))
    plain = _without(parts, {"format", "ranges", "pool_factor"})
    yield plain
    yield from (plain | {"format": name, "ranges": None} for name in OUTPUT_FORMATS)
    roles = (None, "query", "document") if "role" in parts else ()
    yield from (
        parts | {"role": role, "prompt": prompt} for role in roles for prompt in _prompts(manifest)
    )
    dims = {
        *(model.matryoshka_dims or ()),
        model.dim,
        model.truncate_dim or model.dim,
        parts["dim"],
    }
    texts = {parts["prompt"], *_prompts(manifest)}
    for precision, settings in manifest.precisions.items():
        graphs = dict(settings.content_sha256)
        vision = graphs.pop(VISION, None)
        if precision == parts["precision"]:  # an older bundle's manifest does not have it
            graphs[parts["task"]], vision = parts["graph"], parts["vision"]
        for task, graph in graphs.items():
            of_graph = parts | {
                "task": task,
                "graph": graph,
                "vision": vision,
                "precision": precision,
            }
            for numerics, dim, prompt, normalized in product(
                CLASSES, sorted(dims), sorted(texts), {True, model.normalize}
            ):
                yield of_graph | {
                    "numerics": numerics,
                    "dim": dim,
                    "prompt": prompt,
                    "normalized": normalized,
                }


def _prompts(manifest: Manifest) -> set[str]:
    return {"", *(p for task in manifest.tasks.values() for p in task.prompts.values())}


def _without(members: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if name not in names}


def _checked(stored: str) -> str:
    found = _FORM.fullmatch(stored) if isinstance(stored, str) else None
    if found is None:
        raise EmbedgeValueError(
            f"stored: expected a fingerprint such as e1:0123456789abcdef, or its parts, found {stored!r:.80}"
        )
    if found[1] != _VERSION:
        raise EmbedgeValueError(
            f"stored: {stored} is a fingerprint of form e{found[1]}, this embedge knows e{_VERSION}: install the "
            "embedge that made it, or embed everything anew"
        )
    return stored


def _parts_in(stored: Mapping[str, Any]) -> Parts:
    parts = stored.get("parts", stored)
    if not isinstance(parts, Mapping):
        raise EmbedgeValueError(
            f"stored: expected parts as fingerprint_parts() gives them, found {parts!r:.80}"
        )
    if missing := {"graph", "precision", "numerics", "dim"} - set(parts):
        raise EmbedgeValueError(
            f"stored: expected what fingerprint_parts() gives, found no {', '.join(sorted(missing))}"
        )
    if parts is not stored and "fingerprint" in stored:
        said, made = _checked(stored["fingerprint"]), fingerprint_of(parts)
        if said != made:
            raise EmbedgeValueError(
                f"stored: the fingerprint is {said}, and its parts give {made}: one of them was changed; take what "
                "was stored with the vectors, or embed everything anew"
            )
    return dict(parts)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:20]}…"
