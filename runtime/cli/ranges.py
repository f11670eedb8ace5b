"""``embedge ranges``: the ranges of 8-bit output formats, from some texts into the bundle's manifest."""

from __future__ import annotations

import argparse

from embedge.runtime.cli.text_input import read_records
from embedge.runtime.errors import EmbedgeError
from embedge.runtime.output_ranges import calibrate_ranges

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = (
        "Take the range of each dimension from the vectors of some texts, and keep it in the bundle's manifest. "
        "--output-format int8 and uint8 make codes by it. An export has done so with its calibration texts, but of "
        "large models; texts of your own clip less."
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="the bundle's folder")
    add(
        "--texts", metavar="FILE", required=True,
        help="a text a line, or with --field JSONL: some hundreds such as you embed",
    )  # fmt: skip
    add("--field", help="key of the text in a JSON object")
    add(
        "--task", nargs="+", dest="tasks", metavar="NAME",
        help="these, again where they have ranges (default: all that have none)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="without --task: take those of all tasks again")
    add(
        "--precision",
        help="whose graphs to run (default: of each task the smallest that a CPU runs)",
    )
    add("--threads", type=int, metavar="N", help="default: the cores this process really has")


def run(args: argparse.Namespace) -> int:
    """Takes the ranges, and says of what.

    Raises:
        EmbedgeError: as :func:`calibrate_ranges`, or if the texts cannot be read.
    """
    try:
        with open(args.texts, "rb") as file:
            texts = [record.text for record in read_records(file, args.field)]
    except OSError as error:
        raise EmbedgeError(f"--texts {args.texts}: {error.strerror or error}") from error
    taken = calibrate_ranges(
        args.bundle,
        texts,
        tasks=args.tasks,
        precision=args.precision,
        threads=args.threads,
        overwrite=args.overwrite,
    )
    tasks = ", ".join(f"{task} ({precision})" for task, precision in taken.items())
    print(f"{args.bundle}: ranges of {len(texts)} texts for {tasks}")
    return 0
