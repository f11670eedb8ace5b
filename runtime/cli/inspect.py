"""``embedge inspect``: what a bundle holds, whether its files are whole, how each layer fared."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from embedge.runtime.bundle.contract import EXACT_OPTION, UNPACKED_PRECISION
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.json_object import read_json_object
from embedge.runtime.bundle.manifest import Manifest, Model, Precision, Source
from embedge.runtime.cli.messages import printable
from embedge.runtime.cli.table import named_value, table
from embedge.runtime.encode.fingerprint import fingerprint_of, parts_of
from embedge.runtime.encode.request import CallOptions, Request
from embedge.runtime.errors import BundleError, EmbedgeError, EmbedgeValueError
from embedge.runtime.host.saturation import describe_processor
from embedge.runtime.kernels.library import describe_kernels
from embedge.runtime.scoring.quantization import CODE_STEPS, OUTPUT_FORMATS, RANGED
from embedge.runtime.sessions.prepared_graphs import PreparedGraphs

__all__ = ["add_arguments", "run"]

_ERROR_KEYS = ("output_error", "sqnr_db")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare every file's SHA-256, prepared ones too; exit 1 if one differs",
    )
    parser.add_argument("--layers", action="store_true", help="show every layer's format and error")
    parser.add_argument("--worst-first", action="store_true", help="with --layers: sort by error")
    parser.add_argument("--task", help="with --layers: only this task")
    parser.add_argument("--precision", help="with --layers: only this precision")
    parser.add_argument("--json", action="store_true", help="one JSON document with all there is")
    parser.epilog = """examples:
  embedge inspect bundle --verify
  embedge inspect bundle --layers --worst-first --precision int4
  embedge inspect bundle --json"""


def run(args: argparse.Namespace) -> int:
    """Prints the bundle; 1 if a file is not what the manifest says.

    Raises:
        BundleError: if the bundle cannot be read, or with ``--verify`` is damaged.
    """
    if not args.layers and (args.worst_first or args.task or args.precision):
        raise EmbedgeValueError("--worst-first, --task and --precision go with --layers")
    bundle = Bundle(args.bundle, verify="none")
    problems = bundle.problems(hashes=args.verify)
    prepared = PreparedGraphs(bundle)
    if args.verify and not problems:
        problems = prepared.problems()
    layers = _layers(bundle, args) if args.layers else []
    if args.json:
        print(json.dumps(_document(bundle, problems, layers), indent=2))
    else:
        print("\n".join(map(printable, [*_summary(bundle), *_layer_tables(layers)])))
        if args.verify and not problems:
            print(f"\nverified: {len(bundle.manifest.files)} files match their SHA-256")
            if prepared.count:
                print(f"verified: {prepared.count} prepared graphs match theirs")
    if problems:
        raise BundleError("\n".join(problems))
    return 0


def _summary(bundle: Bundle) -> list[str]:
    manifest, model = bundle.manifest, bundle.manifest.model
    dims = "any" if model.matryoshka_dims is None else ", ".join(map(str, model.matryoshka_dims))
    cut = f"; {model.truncate_dim} by default" if model.truncate_dim else ""
    facts = [
        ("bundle", str(bundle.root)),
        ("source", f"{manifest.source.name} ({manifest.source.model_type})"),
        *_base(manifest.source),
        ("license", manifest.source.license or "not stated"),
        (
            "format",
            f"{manifest.format_version}, by {manifest.producer.name} {manifest.producer.version}",
        ),
        (
            "vectors",
            f"{model.dim} dimensions, {model.similarity} similarity, "
            f"{'normalized' if model.normalize else 'not normalized'}",
        ),
        ("truncation", "no" if model.late_interaction else f"to {dims}{cut}"),
        ("multi-vectors", str(model.multi_vector_dim or "no")),
        ("pooling", model.pooling),
        *_late(model),
        (
            "longest text",
            f"{model.max_length} tokens, cut on the {manifest.tokenizer.truncation_side}",
        ),
        ("takes", ", ".join(model.modalities)),
        ("stored as", _formats(manifest)),
        ("files", manifest.files_sha256[:16]),
    ]
    if model.image is not None:
        pixels = f"{model.image.min_pixels:,} to {model.image.max_pixels:,} pixels"
        facts.append(("images", f"scaled to {pixels}, {model.image.factor}² of them a token"))
    facts.append(("processor", describe_processor()))
    facts.append(("kernels", describe_kernels()))
    lines = [line for name, value in facts for line in named_value(name, value)]
    rows = [["task", "adapter", "prompts (* default)"]]
    for name, task in manifest.tasks.items():
        adapter = "bare" if task.adapter is None else task.adapter.name or "yes"
        prompts = "  ".join(
            f"{key}{'*' if key == task.default_prompt else ''}={text!r}"
            for key, text in task.prompts.items()
        )
        rows.append([name, adapter, prompts or "none"])
    lines += ["", *table(rows)]
    if len(rows := [_RANGES, *_ranges(manifest)]) > 1:
        lines += ["", *table(rows)]
    rows = [["precision", "devices", "bytes", "without embedge", "tasks"]]
    for name, precision in manifest.precisions.items():
        size = f"{manifest.folder_bytes(name):,}"
        rows.append(
            [
                f"{name}, shared" if precision.task_tensors else name,
                ", ".join(precision.devices),
                size,
                _elsewhere(name, precision),
                ", ".join(precision.graphs),
            ]
        )
    lines += ["", *table(rows)]
    rows = [["precision", "task", "fingerprint of a call without options"]]
    rows += [
        [p, t, kind] for p, by_task in _fingerprints(bundle).items() for t, kind in by_task.items()
    ]
    if len(rows) > 1:
        lines += ["", *table(rows), ""]
    rows = [["precision", "maps from", "to", "texts", "cosine", "lowest", "top-10"]]
    rows += list(_maps(manifest.precisions))
    if len(rows) > 1:
        lines += ["one pass for several tasks, against each task's own graph:", *table(rows), ""]
    total = sum(entry.size for entry in manifest.files.values())
    lines.append(f"{len(manifest.files)} files, {total:,} bytes in all")
    rows = [["precision", "task", "texts", "cosine", "lowest", "top-10", "quality (reference)"]]
    for name, precision in manifest.precisions.items():
        for task_name, figures in precision.fidelity.items():
            rows.append([name, task_name, *_figures(figures)])
    if len(rows) > 1:
        lines += [
            "",
            "against the unquantized model, at the full dimension (--json has the others):",
        ]
        lines += table(rows)
    return lines


_RANGES = ["ranges of", "vectors", "taken from", "lowest", "highest", "mean step"]


def _formats(manifest: Manifest) -> str:
    """The formats that vectors are given in, and what those of 8 bits need."""
    free = ", ".join(name for name in OUTPUT_FORMATS if name not in RANGED)
    ranged = " and ".join(RANGED)
    lacking = [name for name, task in manifest.tasks.items() if task.output_ranges is None]
    if not lacking:
        return f"{free}; {ranged} by the ranges below"
    of = "" if len(lacking) == len(manifest.tasks) else f" of {', '.join(lacking)}"
    return f"{free}; {ranged}{of} by ranges of the call, or after `embedge ranges`"


def _ranges(manifest: Manifest) -> Iterator[list[str]]:
    """A row for the ranges of each task's vectors, and of its multi-vectors."""
    for name, task in manifest.tasks.items():
        for kind, ranges in (("whole", task.output_ranges), ("a token", task.token_ranges)):
            if ranges is None:
                continue
            widths = [high - low for low, high in zip(ranges.lowest, ranges.highest, strict=True)]
            yield [
                name,
                kind,
                f"{ranges.vectors:,}",
                f"{min(ranges.lowest):.4f}",
                f"{max(ranges.highest):.4f}",
                f"{sum(widths) / len(widths) / CODE_STEPS:.2g}",
            ]


def _elsewhere(name: str, precision: Precision) -> str:
    """Whether other programs open a precision's graphs, or the option that they need for it."""
    if name == UNPACKED_PRECISION:
        return "no"
    if precision.task_tensors:
        return "by its README"  # a graph that takes a task's tensors
    option = EXACT_OPTION.removeprefix("session.")  # a line has 80 columns
    return f"{option}=1" if precision.saturates else "as it is"


def _fingerprints(bundle: Bundle) -> dict[str, dict[str, str]]:
    """Fingerprints on this machine, by precision and task, of those whose contents the manifest has."""
    found: dict[str, dict[str, str]] = {}
    late = bundle.manifest.model.late_interaction is not None
    for precision, settings in bundle.manifest.precisions.items():
        device = "cpu" if "cpu" in settings.devices else "cuda"
        for task in (t for t in settings.graphs if t in settings.content_sha256):
            with suppress(EmbedgeValueError, BundleError):  # a call would say why it cannot be made
                request = Request.look_up(
                    bundle.manifest, precision, CallOptions(task=task, multi_vector=late)
                )
                parts = parts_of(bundle, bundle.manifest, precision, device, request)
                found.setdefault(precision, {})[task] = fingerprint_of(parts)
    return found


def _base(source: Source) -> list[tuple[str, str]]:
    how = source.base_quantization
    return [] if how is None else [("base", f"as bitsandbytes quantizes it: {how}")]


def _late(model: Model) -> list[tuple[str, str]]:
    """What is said of late interaction, nothing for models that pool."""
    rules = model.late_interaction
    if rules is None:
        return []
    lengths = f"queries {rules.query_length} tokens, documents {rules.document_length}"
    filled = rules.expansion and f"queries filled up to {rules.expansion.length}"
    skipped = rules.skipped_ids and f"{len(rules.skipped_ids)} tokens left out"
    return [("token vectors", "; ".join(part for part in (lengths, filled, skipped) if part))]


def _layers(bundle: Bundle, args: argparse.Namespace) -> list[dict[str, Any]]:
    """``{"precision", "task", "layers": […]}`` of each recorded table that was asked for."""
    manifest = bundle.manifest
    for name, known in (("task", manifest.tasks), ("precision", manifest.precisions)):
        value = getattr(args, name)
        if value is not None and value not in known:
            raise EmbedgeValueError(
                f"the bundle has no {name} {value!r}; it has {', '.join(known)}"
            )
    found = []
    for name, precision in manifest.precisions.items():
        for task, path in precision.layers.items():
            if args.precision in (None, name) and args.task in (None, task):
                layers = read_json_object(bundle.file(path)).get("layers")
                if not isinstance(layers, list) or not all(isinstance(x, dict) for x in layers):
                    raise BundleError(
                        f"{bundle.root / path}: layers: expected a list of objects; export the "
                        "bundle again"
                    )
                if args.worst_first:
                    layers = sorted(layers, key=_badness, reverse=True)
                found.append({"precision": name, "task": task, "layers": layers})
    if not found:
        raise EmbedgeError(f"{bundle.root}: no layer was recorded for what was asked")
    return found


def _badness(layer: Mapping[str, Any]) -> tuple[float, float]:
    """Sorts by the error of the output where it was recorded, then by that of the weight."""
    output_error, sqnr_db = (layer.get(key) for key in _ERROR_KEYS)
    return (
        float(output_error) if isinstance(output_error, (int, float)) else -1.0,
        -float(sqnr_db) if isinstance(sqnr_db, (int, float)) else -1e9,
    )


def _layer_tables(listed: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for layers in listed:
        rows = [["layer", "shape", "format", "bytes", "SQNR dB", "output error"]]
        for layer in layers["layers"]:
            shape = layer.get("shape")
            rows.append(
                [
                    str(layer.get("name", "?")),
                    " × ".join(map(str, shape)) if isinstance(shape, list) else "",
                    str(layer.get("format", "?")),
                    _number(layer.get("bytes"), ","),
                    _number(layer.get("sqnr_db"), ".1f"),
                    _number(layer.get("output_error"), ".2g"),
                ]
            )
        lines += ["", f"{layers['precision']}, {layers['task']}", *table(rows)]
    return lines


def _document(
    bundle: Bundle, problems: Sequence[str], layers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    document: dict[str, Any] = {
        "bundle": str(bundle.root),
        "manifest": bundle.manifest.to_dict(),
        "bytes": sum(entry.size for entry in bundle.manifest.files.values()),
        "problems": list(problems),
        "processor": describe_processor(),
        "kernels": describe_kernels(),
        "fingerprints": _fingerprints(bundle),
        "files_sha256": bundle.manifest.files_sha256,
        "output_formats": {
            name: [f for f in OUTPUT_FORMATS if f not in RANGED or task.output_ranges is not None]
            for name, task in bundle.manifest.tasks.items()
        },
    }
    return {**document, "layers": list(layers)} if layers else document


def _maps(precisions: Mapping[str, Precision]) -> Iterator[list[str]]:
    """A row a task of each precision's maps."""
    for name, precision in precisions.items():
        maps = precision.maps
        for task in () if maps is None else maps.tasks:
            if maps is None or task == maps.base:
                continue
            at = maps.fidelity.get(task)
            figures = at if isinstance(at, Mapping) else {}
            yield [
                *(name, maps.base, task, _number(figures.get("texts"), ",")),
                _number(figures.get("cosine_mean"), ".5f"),
                _number(figures.get("cosine_min"), ".5f"),
                _number(figures.get("top10_overlap"), ".3f"),
            ]


def _figures(task: Any) -> list[str]:
    """Texts, mean and lowest cosine, top-10 and quality of a task, at the largest dimension."""
    figures = task if isinstance(task, Mapping) else {}
    at = _full(figures.get("dims"))
    row = [_number(figures.get("texts"), ",")]
    row += [
        _number(at.get("cosine_mean"), ".5f"),
        _number(at.get("cosine_min"), ".5f"),
        _number(at.get("top10_overlap"), ".3f"),
    ]
    quality = figures.get("quality")
    sets = quality if isinstance(quality, Mapping) else {}
    values = [(name, _full(by_dim)) for name, by_dim in sets.items()]
    row.append(
        ", ".join(
            f"{name if len(values) > 1 else ''} {_number(figure.get('value'), '.4f')} "
            f"({_number(figure.get('reference'), '.4f')})".strip()
            for name, figure in values
        )
    )
    return row


def _full(by_dim: Any) -> Mapping[str, Any]:
    """What was recorded at the largest dimension, none if there is none."""
    found = by_dim if isinstance(by_dim, Mapping) else {}
    dims = [dim for dim in found if isinstance(dim, str) and dim.isdecimal()]
    largest = found[max(dims, key=int)] if dims else {}
    return largest if isinstance(largest, Mapping) else {}


def _number(value: Any, form: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return format(value, form)
    return "" if value is None else str(value)
