"""``embedge bench``: measure a bundle, print the table, write the report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from embedge.bench.errors import BenchArgumentError
from embedge.runtime.cli.table import table

if TYPE_CHECKING:
    from embedge.bench.options import BenchOptions
    from embedge.bench.report.report import Report

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``, most under the names of :class:`BenchOptions`."""
    parser.description = "Measure a bundle against the unquantized model and other runtimes."
    parser.add_argument(
        "bundles", nargs="+", type=Path, metavar="BUNDLE",
        help="the bundle's folder; of several, all of the same tasks, one report is made",
    )  # fmt: skip
    parser.add_argument("--reference", required=True, help="the source model: a folder or a hub id")
    parser.add_argument(
        "--adapter", action="append", default=[], dest="adapters", metavar="NAME=FOLDER",
        help="a task's adapter, or the folder that holds it; once per task (default: those the model brings)",
    )  # fmt: skip
    parser.add_argument(
        "--task", nargs="+", dest="tasks", metavar="NAME", help="tasks (default: all)"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        dest="precisions",
        metavar="NAME",
        help="precisions (default: all)",
    )
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="texts for fidelity: .jsonl or a text a line"
    )
    parser.add_argument(
        "--eval", action="append", default=[], dest="evaluations", metavar="TASK=PATH",
        help="labelled set: .jsonl, .csv, .tsv or .parquet of query/passage, text1/text2/score or "
        "sentence1/sentence2/score or query/image, a BEIR or ViDoRe folder, or mteb:NAME; the first of a task is "
        "its main one",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a subset, in three minutes")
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME",
        help="onnxruntime, openvino, llama.cpp, torch, or one variant such as openvino:int8-dq32; "
        "none (default: the usual variants of those installed)",
    )  # fmt: skip
    parser.add_argument(
        "--peer-files", type=Path, metavar="DIR",
        help="keep the files that peers are made of, which takes minutes, for the next run on the same model",
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
    parser.add_argument(
        "--max-pixels", nargs="+", type=int, default=[], metavar="N",
        help="image budgets: quality, tokens and time of page images scaled down to N pixels, beside the bundle's own",
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
        "--target", "--bar", nargs="+", type=int, default=[], dest="targets", metavar="N",
        help="measure what these promises need, check them, exit 1 if one is not kept",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("bench-report"), metavar="DIR",
        help="where report.json, report.html, report.md and report.png go (default: bench-report)",
    )  # fmt: skip
    parser.add_argument("--record", action="store_true", help="write the figures into the bundle")
    parser.add_argument("--json", action="store_true", help="print report.json as the last line")
    parser.epilog = """examples:
  embedge bench bundle --reference MODEL --adapter code=FOLDER --quick
  embedge bench bundle --reference MODEL --adapter code=FOLDER --record
  embedge bench bundle --reference MODEL --shapes 1x16 8x64 --peers none
  embedge bench merged shared --reference MODEL --adapter code=FOLDER"""


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; return the exit status: 1 if a target was asked for and missed.

    Raises:
        EmbedgeError: what was asked for cannot be measured.
    """
    options = list(_options(args))
    from embedge.bench.plan import make_plan
    from embedge.bench.report.record import record
    from embedge.bench.report.write import write_joined, write_report
    from embedge.bench.run import run_bench
    from embedge.bench.targets import check_targets
    from embedge.runtime.host.progress import LogLines

    if len(options) > 1:  # what is wrong with the last is said before the first takes minutes
        for one in options:
            make_plan(one)
    bar = sys.stderr.isatty()
    reports, files, passed = [], [], True
    for one in options:
        report = run_bench(one, show_progress_bar=bar, lines=None if bar else LogLines(10))
        reports.append(report)
        checks = check_targets(report, args.targets)
        passed = passed and all(check.passed for check in checks)
        lines = [check.line() for check in checks]
        _print(report, lines, side_by_side=bool(args.shapes))
        out = args.out if len(options) == 1 else args.out / report.bundle
        files += write_report(report, out, lines)
        if args.record:
            record(report, one.bundle)
            print(f"recorded in {one.bundle}")
    files += write_joined(reports, args.out) if len(reports) > 1 else []
    print("report: " + ", ".join(str(file) for file in files))
    if args.json:
        print(
            json.dumps([r.to_dict() for r in reports] if len(reports) > 1 else reports[0].to_dict())
        )
    return 0 if passed else 1


def _print(report: Report, checks: Sequence[str], *, side_by_side: bool) -> None:
    from embedge.bench.report.tables import comparison_table, main_table, process_table
    from embedge.bench.report.write import HOW_TO_COMPARE, HOW_TO_READ

    print(HOW_TO_COMPARE if side_by_side else HOW_TO_READ)
    tables = [comparison_table(report.rows) if side_by_side else main_table(report.rows)]
    tables += [process_table(report)] if report.process else []
    for shown in tables:
        print("", *table([shown.header, *shown.rows], shown.labels), sep="\n")
    for line in (*(f"note: {note}" for note in report.notes), *checks):
        print(line)


def _options(args: argparse.Namespace) -> Iterator[BenchOptions]:
    """Yield what to measure of each bundle; other systems beside the first alone.

    Raises:
        BenchArgumentError: an option is wrong, or two bundles have one name.
    """
    from embedge.bench.options import FULL, QUICK, SHAPES, BenchOptions, Shape
    from embedge.bench.targets import profile_for

    profile = QUICK if args.quick else FULL
    if args.targets:
        profile = profile_for(args.targets, profile)
    if args.shapes:
        profile = replace(profile, singles=0, invariance=0, process_repeats=0, pages=0)
    numbers = {"rounds": args.rounds, "texts": args.limit}
    profile = replace(profile, **{k: n for k, n in numbers.items() if n is not None})
    names = [path.resolve().name for path in args.bundles]
    if len(set(names)) < len(names):
        raise BenchArgumentError(
            f"{' '.join(map(str, args.bundles))}: expected folders of different names, by which a report tells "
            f"bundles apart, found {', '.join(names)}"
        )
    given = {f.name: getattr(args, f.name) for f in fields(BenchOptions) if hasattr(args, f.name)}
    given |= {
        "adapters": dict(_pair("--adapter", text) for text in args.adapters),
        "evaluations": [_pair("--eval", text) for text in args.evaluations],
        "shapes": [Shape.parse(name) for name in args.shapes] if args.shapes else SHAPES,
    }
    for number, bundle in enumerate(args.bundles):
        alone = profile if number == 0 else replace(profile, others=False)
        yield BenchOptions(**given | {"bundle": bundle, "profile": alone})


def _pair(option: str, text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise BenchArgumentError(f"{option} {text}: expected NAME=PATH")
    return name, Path(path)
