"""``embedge choose``: the configuration of a bundle that keeps some limits, or which limit none does."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedge.runtime.cli.table import table
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.host.cores import available_cores
from embedge.runtime.host.memory import parse_bytes
from embedge.runtime.host.processor import processor_name

if TYPE_CHECKING:
    from embedge.bench.report.choose import Candidate, Choice
    from embedge.bench.report.report import Report

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.description = (
        "Choose what of a bundle to run under limits, by what `embedge bench` measured. Prints the commands that "
        "prepare it, or which limit nothing meets and by how much; then the exit code is 1. Figures are compared "
        "with a margin: 10 % of times, 3 % of memory; times by their slow end, quality by the low end of its interval."
    )
    parser.add_argument(
        "reports", nargs="+", type=Path, metavar="REPORT_OR_BUNDLE",
        help="report.json of `embedge bench`, or a bundle that --record wrote it into",
    )  # fmt: skip
    parser.add_argument(
        "--min-quality", metavar="SHARE",
        help="least share of the unquantized model's quality, such as 0.99, of each task",
    )  # fmt: skip
    parser.add_argument(
        "--max-latency", metavar="TIME", help="95th percentile of one text, such as 50ms"
    )
    parser.add_argument(
        "--min-throughput", metavar="N", help="texts a second in the largest batches measured"
    )
    parser.add_argument(
        "--max-memory", metavar="SIZE", help="peak of the process, such as 1GB or 300MB"
    )
    parser.add_argument(
        "--max-start", metavar="TIME", help="from the start of Python to the first vector"
    )
    parser.add_argument("--max-disk", metavar="SIZE", help="files of the bundle that is needed")
    parser.add_argument(
        "--max-index", metavar="SIZE", help="vectors of a million texts, such as 400MB"
    )
    parser.add_argument(
        "--task", nargs="+", dest="tasks", metavar="NAME", help="for these alone (default: all)"
    )
    parser.add_argument(
        "--prefer",
        choices=("quality", "latency", "memory", "disk", "index", "throughput"),
        help="what is best of those that fit (default: quality, or latency with --min-quality)",
    )
    parser.add_argument(
        "--modality", choices=("text", "image"),
        help="what is embedded: texts, or page images (default: text, or what the labelled sets are of)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the choice as JSON alone")
    parser.epilog = """examples:
  embedge choose bundle --max-memory 1GB --max-latency 50ms --min-quality 0.99
  embedge choose bench-report/report.json --task code --max-index 400MB
  embedge choose bundle --max-disk 40MB --prefer latency"""


def run(args: argparse.Namespace) -> int:
    """Print the choice; return 1 if nothing meets the limits.

    Raises:
        EmbedgeError: a limit is not one, or a report cannot be read.
    """
    bounds = dict(_bounds(args))
    from embedge.bench.report.choose import choose, modality_of
    from embedge.bench.report.recorded import measured_bundle, read_reports

    found = [(path, report) for path in args.reports for report in read_reports(path)]
    reports = [report for _, report in found]
    modality = args.modality or modality_of(reports)
    choice = choose(reports, bounds, tasks=args.tasks, prefer=args.prefer, modality=modality)
    folders = {report.bundle: measured_bundle(path, report) for path, report in found}
    paths = {name: str(folder or name) for name, folder in folders.items()}
    elsewhere = {name for name, folder in folders.items() if folder is None}
    report = _report_of(choice, reports)
    lines = [
        *_modality_notes(args.modality, modality, report),
        *_machine_notes(report),
        *report.notes,
    ]
    if args.json:
        print(json.dumps(_document(choice, report, paths, lines), ensure_ascii=False, indent=1))
        return 0 if choice.candidate else 1
    print("\n".join(_answer(choice, report, paths, elsewhere)))
    print(*(f"note: {line}" for line in lines), sep="\n")
    return 0 if choice.candidate else 1


def _bounds(args: argparse.Namespace) -> Iterator[tuple[str, float]]:
    for figure in ("memory", "disk", "index"):
        if (text := getattr(args, f"max_{figure}")) is not None:
            yield figure, float(parse_bytes(f"max_{figure}", text))
    for figure in ("latency", "start"):
        if (text := getattr(args, f"max_{figure}")) is not None:
            yield figure, _milliseconds(f"max_{figure}", text)
    if args.min_quality is not None:
        yield "quality", _number("min_quality", args.min_quality, "a share such as 0.99", most=1.0)
    if args.min_throughput is not None:
        yield "throughput", _number("min_throughput", args.min_throughput, "texts a second")


def _milliseconds(name: str, text: str) -> float:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s)", text.strip())
    if found is None or not float(found[1]):
        raise EmbedgeValueError(
            f"{name} {text!r}: expected a time above 0 with ms or s, such as 50ms", arguments=[name]
        )
    return float(found[1]) * (1000 if found[2] == "s" else 1)


def _number(name: str, text: str, expected: str, most: float = float("inf")) -> float:
    found = re.fullmatch(r"[0-9]*\.?[0-9]+", text.strip())
    if found is None or not 0 < float(text) <= most:
        limit = f"above 0 and at most {most:g}" if most < float("inf") else "above 0"
        raise EmbedgeValueError(f"{name} {text!r}: expected {expected}, {limit}", arguments=[name])
    return float(text)


def _report_of(choice: Choice, reports: list[Report]) -> Report:
    bundle = choice.candidate.bundle if choice.candidate else reports[0].bundle
    return next(report for report in reports if report.bundle == bundle)


def _modality_notes(asked: str | None, modality: str, report: Report) -> Iterator[str]:
    """Yield that there is another modality, where nobody said which is meant."""
    if asked is None and any(row.images for row in report.rows):
        other = "text" if modality == "image" else "image"
        yield f"figures are of {modality}s; --modality {other} chooses for {other}s"


def _machine_notes(report: Report) -> Iterator[str]:
    """Yield what a reader has to know of the machine that was measured."""
    there, threads = report.machine.get("processor"), report.machine.get("threads")
    here, cores = processor_name(), available_cores()
    if there != here:
        yield (
            f"times and memory are of another machine, {there}; this one is {here}: run `embedge bench` here for "
            "its own"
        )
    elif threads is not None and threads > cores:
        yield f"measured with {threads} threads; this process has {cores} cores"


def _answer(
    choice: Choice, report: Report, paths: dict[str, str], elsewhere: set[str]
) -> Iterator[str]:
    machine = f"{report.machine.get('processor')}, {report.machine.get('threads')} threads"
    if choice.candidate is None:
        yield f"none of {choice.of} configurations meets the limits ({machine}):"
        yield from (f"- {sentence}" for sentence in choice.missed)
        return
    chosen = choice.candidate
    yield (
        f"{chosen.name}: best {choice.preferred} of the {choice.fitting} of {choice.of} configurations that meet "
        f"the limits ({machine})"
    )
    if chosen.share is not None and chosen.quality is not None:
        yield (
            f"quality: {chosen.share * 100:.2f} % of the unquantized model's, lower end of the 95 % interval "
            f"{chosen.quality * 100:.2f} %"
        )
    yield ""
    yield from table([("limit", "with margin", "of"), *(kept.line for kept in choice.kept)], 3)
    yield ""
    digest = str(report.settings.get("files_sha256"))[:16]
    yield (
        f"prepare it, where the folder {chosen.bundle} lies, of which `embedge inspect` shows files {digest}:"
        if chosen.bundle in elsewhere
        else "prepare it:"
    )
    yield from (f"  {line}" for line in _commands(chosen, report, paths))
    yield "run it:"
    yield from (f"  {line}" for line in _code(chosen, report))


def _commands(chosen: Candidate, report: Report, paths: dict[str, str]) -> list[str]:
    """Return the commands that prepare a choice."""
    folder = _folder(chosen)
    words = ["embedge", "subset", paths[chosen.bundle], folder]
    commands = [shlex.join([*words, "--precision", chosen.precision, "--task", *chosen.tasks])]
    of_texts = chosen.modality == "text" and "int8" in chosen.output_format
    if of_texts and not report.settings.get("output_ranges"):
        commands.append(f"embedge ranges {shlex.quote(folder)} --texts FILE")
    return commands


def _folder(chosen: Candidate) -> str:
    return f"{chosen.bundle}-chosen"


def _code(chosen: Candidate, report: Report) -> list[str]:
    """Return the lines of Python that run a choice."""
    whole = max((int(dim) for row in report.rows for dim in row.fidelity), default=chosen.dim)
    options: dict[str, Any] = {"precision": chosen.precision}
    options["threads"] = report.machine.get("threads")
    if report.settings.get("device", "cpu") != "cpu":
        options["device"] = report.settings["device"]
    call: dict[str, Any] = {"task": chosen.tasks[0]}
    if len(chosen.tasks) == 1:
        options |= call
        call = {}
    call |= {"truncate_dim": chosen.dim} if chosen.dim < whole else {}
    call |= {"multi_vector": True} if report.settings.get("late_interaction") else {}
    rescored = chosen.output_format == "binary+int8"
    coded = chosen.modality == "image" and "int8" in chosen.output_format
    names = ["Embedder"] + (["quantize_embeddings"] if rescored or coded else [])
    names += (["ranges_of"] if coded else []) + (["search_binary"] if rescored else [])
    model = f"model = Embedder({_folder(chosen)!r}{_arguments(options)})"
    lines = [f"from embedge.runtime import {', '.join(names)}", model]
    if rescored and chosen.modality == "text":
        return [*lines, *_rescoring(_arguments(call))]
    if chosen.modality == "image":
        return [*lines, *_page_lines(chosen, call)]
    stored = {} if chosen.output_format == "float32" else {"output_format": chosen.output_format}
    if not chosen.searches:
        return [*lines, f"vectors = model.encode(texts{_arguments(call | stored)})"]
    asked = stored if chosen.output_format == "binary" else {}
    return [
        *lines,
        f"documents = model.encode_document(texts{_arguments(call | stored)})",
        f"queries = model.encode_query(questions{_arguments(call | asked)})",
    ]


def _page_lines(chosen: Candidate, call: dict[str, Any]) -> list[str]:
    """Return the lines that embed pages, and questions for them; 8-bit codes have the ranges of the pages."""
    pages = call | {"max_pixels": chosen.max_pixels}
    rescored = chosen.output_format == "binary+int8"
    stored = rescored or chosen.output_format == "int8"
    direct = (
        {}
        if stored or chosen.output_format == "float32"
        else {"output_format": chosen.output_format}
    )
    asked = direct if chosen.output_format == "binary" else {}
    lines = [
        f"documents = model.encode_image(pages{_arguments(pages | direct)})",
        f"queries = model.encode_query(questions{_arguments(call | asked)})",
    ]
    if stored:
        lines += [
            "ranges = ranges_of(documents)",
            'int8 = quantize_embeddings(documents, "int8", ranges)',
        ]
    return [*lines, *_SEARCH] if rescored else lines


_SEARCH = (
    'binary = quantize_embeddings(documents, "binary")',
    "rows, scores = search_binary("
    "queries, binary, int8, ranges=ranges, top_k=10, similarity=model.similarity_fn_name)",
)


def _rescoring(call: str) -> list[str]:
    """Return the lines that search over bits, and again over 8-bit codes."""
    return [
        f"ranges = model.get_output_ranges({call.removeprefix(', ')})",
        f"documents = model.encode_document(texts{call})",
        'int8 = quantize_embeddings(documents, "int8", ranges)',
        f"queries = model.encode_query(questions{call})",
        *_SEARCH,
    ]


def _arguments(options: dict[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)


def _document(
    choice: Choice, report: Report, paths: dict[str, str], notes: list[str]
) -> dict[str, Any]:
    document: dict[str, Any] = {
        "chosen": None,
        "fitting": choice.fitting,
        "configurations": choice.of,
        "missed": list(choice.missed),
        "machine": report.machine,
        "notes": notes,
    }
    if choice.candidate is None:
        return document
    return document | {
        "chosen": choice.candidate.to_dict(),
        "preferred": choice.preferred,
        "limits": {
            kept.limit.option: {"bound": kept.bound, "with_margin": kept.value}
            for kept in choice.kept
        },
        "prepare": _commands(choice.candidate, report, paths),
        "code": _code(choice.candidate, report),
    }
