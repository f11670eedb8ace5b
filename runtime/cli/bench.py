"""``embedge bench``: measure a bundle, print the table, write the report."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedge.bench.errors import BenchArgumentError

if TYPE_CHECKING:
    from embedge.bench.options import BenchOptions

__all__ = ["add_arguments", "run"]

# What each bar needs measured, so that `--bar` alone measures no more.
_NEEDS_LATENCY = {4}
_NEEDS_QUALITY = {2}
_NEEDS_VECTORS = {1, 2, 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.description = "Measure a bundle against the unquantized model and other runtimes."
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("--reference", required=True, help="the source model: a folder or a hub id")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=FOLDER",
        help="a task's adapter, or the folder that holds it; once per task",
    )  # fmt: skip
    parser.add_argument("--task", nargs="+", metavar="NAME", help="tasks (default: all)")
    parser.add_argument("--precision", nargs="+", metavar="NAME", help="precisions (default: all)")
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="texts for fidelity: .jsonl or a text a line"
    )
    parser.add_argument(
        "--eval", action="append", default=[], metavar="TASK=FILE.jsonl",
        help="rows of query/passage or text1/text2/score; the first file of a task is its main one",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a subset, in three minutes")
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME",
        help="onnxruntime, openvino, llama.cpp, torch, or one variant such as openvino:int8-dq32; "
        "none (default: the usual variants of those installed)",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", nargs="+", metavar="BATCHxTOKENS",
        help="compare the systems side by side at these shapes, such as 1x16 8x64, and by fidelity; "
        "no single texts, no cold start, no check of invariance",
    )  # fmt: skip
    parser.add_argument(
        "--torch-types", nargs="+", metavar="NAME",
        help="float32, bfloat16, float16 on CUDA, or none: what merged torch is measured in "
        "(default: what the device multiplies without emulation)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, metavar="N", help="alternating rounds of a shape")
    parser.add_argument("--limit", type=int, metavar="N", help="the most texts for fidelity")
    parser.add_argument("--pooling", help="where the source's files name none")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of every system")
    parser.add_argument(
        "--device", default="cpu", metavar="NAME",
        help="cpu, or cuda: what the bundle and torch run on (default: cpu)",
    )  # fmt: skip
    parser.add_argument(
        "--bar", nargs="+", type=int, metavar="N",
        help="measure what these promises need, check them, exit 1 if one is not kept",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("bench-report"), metavar="DIR",
        help="where report.json, report.md and report.png go (default: bench-report)",
    )  # fmt: skip
    parser.add_argument("--record", action="store_true", help="write the figures into the bundle")
    parser.add_argument("--json", action="store_true", help="print report.json as the last line")
    parser.epilog = """examples:
  embedge bench bundle --reference MODEL --adapter code=FOLDER --quick
  embedge bench bundle --reference MODEL --adapter code=FOLDER --record
  embedge bench bundle --reference MODEL --shapes 1x16 8x64 --peers none"""


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; return the exit status: 1 if a bar was asked for and missed.

    Raises:
        EmbedgeError: what was asked for cannot be measured.
    """
    options = _options(args)
    from embedge.bench.report.record import record
    from embedge.bench.report.tables import comparison_table, main_table, process_table
    from embedge.bench.report.write import HOW_TO_COMPARE, HOW_TO_READ, write_report
    from embedge.bench.run import run_bench
    from embedge.bench.targets import check_bars
    from embedge.runtime.host.progress import LogLines

    if args.bar:
        check_known_bars(args.bar)
    bar = sys.stderr.isatty()
    report = run_bench(options, show_progress_bar=bar, lines=None if bar else LogLines(10))
    checks = check_bars(report, args.bar or [])
    if args.shapes:
        print(HOW_TO_COMPARE, comparison_table(report.rows).text(), sep="\n\n")
    else:
        print(HOW_TO_READ, main_table(report.rows).text(), sep="\n\n")
    if report.process:
        print("\n" + process_table(report).text())
    for note in report.notes:
        print(f"note: {note}")
    for check in checks:
        print(check.line())
    files = write_report(report, args.out, checks)
    if args.record:
        record(report, options.bundle)
        print(f"recorded in {options.bundle}")
    print("report: " + ", ".join(str(file) for file in files))
    if args.json:
        print(json.dumps(report.to_dict()))
    return 0 if all(check.passed for check in checks) else 1


def check_known_bars(bars: list[int]) -> None:
    """Raise BenchError for a bar that does not exist, before anything is measured."""
    from embedge.bench.targets import BARS

    unknown = [bar for bar in bars if bar not in BARS]
    if unknown:
        raise BenchArgumentError(f"--bar {unknown[0]}: known are {', '.join(map(str, BARS))}")


def _options(args: argparse.Namespace) -> BenchOptions:
    from embedge.bench.measure.latency import Shape
    from embedge.bench.options import FULL, QUICK, BenchOptions

    bars = set(args.bar or ())
    effort = QUICK if args.quick else FULL
    if bars and not bars & _NEEDS_VECTORS:
        effort = replace(effort, texts=64, invariance=1)
    evaluations = [_pair("--eval", text) for text in args.eval]
    chosen: dict[str, Any] = {"peers": args.peers, "torch_types": args.torch_types}
    if args.shapes:
        chosen["shapes"] = [Shape.parse(name) for name in args.shapes]
        chosen["process"] = False
        effort = replace(effort, singles=0, invariance=0)
    for option, field, least in (("rounds", "rounds", 1), ("limit", "texts", 11)):
        number = getattr(args, option)
        if number is not None and number < least:
            raise BenchArgumentError(f"--{option} {number}: expected a number from {least}")
        effort = effort if number is None else replace(effort, **{field: number})
    if bars:
        chosen["process"] = False
        chosen["latency"] = bool(bars & _NEEDS_LATENCY)
        evaluations = evaluations if bars & _NEEDS_QUALITY else []
        if not bars & _NEEDS_LATENCY:
            chosen["peers"] = args.peers or ["none"]
            chosen["torch_types"] = args.torch_types or ["none"]
    return BenchOptions(
        bundle=args.bundle,
        reference=args.reference,
        adapters=dict(_pair("--adapter", text) for text in args.adapter),
        tasks=args.task,
        precisions=args.precision,
        texts=args.texts,
        evaluations=evaluations,
        pooling=args.pooling,
        threads=args.threads,
        device=args.device,
        effort=effort,
        **chosen,
    )


def _pair(option: str, text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise BenchArgumentError(f"{option} {text}: expected NAME=PATH")
    return name, Path(path)
