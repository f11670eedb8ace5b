"""``embedge fit-maps``: maps by which one pass gives the vectors of several tasks, into a bundle."""

from __future__ import annotations

import argparse

from embedge.export.task_maps import fit_maps
from embedge.runtime.cli.table import table
from embedge.runtime.cli.text_input import read_records
from embedge.runtime.errors import EmbedgeError
from embedge.runtime.host.progress import LogLines

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = (
        "Fit maps, and add them to the bundle. They make the vectors of the other tasks from one pass with the adapter "
        "of the base: Embedder.encode_tasks gives all of them. Texts need no labels."
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="the bundle's folder")
    add(
        "--texts", metavar="FILE", nargs="+", required=True,
        help="a text a line, or with --field JSONL: some thousands such as you embed for all of the tasks",
    )  # fmt: skip
    add("--field", help="key of the text in a JSON object")
    add(
        "--base", metavar="NAME", required=True,
        help="the task whose adapter the pass has; the sum of the others' adapters is a good one",
    )  # fmt: skip
    add(
        "--task", nargs="+", dest="tasks", metavar="NAME", help="map to these (default: all others)"
    )
    add(
        "--precision", nargs="+", dest="precisions", metavar="P",
        help="whose graphs get maps (default: all that run on a CPU)",
    )  # fmt: skip
    add(
        "--layers", type=int, default=0, metavar="N",
        help="take the mean of the states of so many layers before the last too (default: 0, none)",
    )  # fmt: skip
    add(
        "--hidden", type=int, default=0, metavar="N",
        help="width of a network beside the linear map (default: 0, none)",
    )  # fmt: skip
    add(
        "--steps", type=int, default=1000, metavar="N",
        help="for which the network is trained (default: 1000)",
    )  # fmt: skip
    add("--threads", type=int, metavar="N", help="default: the cores this process really has")
    add("--overwrite", action="store_true", help="fit maps again where a precision has some")
    add("--quiet", action="store_true", help="say nothing of how far it is")


def run(args: argparse.Namespace) -> int:
    """Fits the maps, and says how near they come to the tasks' own graphs.

    Raises:
        EmbedgeError: as :func:`fit_maps`, or if the texts cannot be read.
    """
    texts: list[str] = []
    for name in args.texts:
        try:
            with open(name, "rb") as file:
                texts += [record.text for record in read_records(file, args.field)]
        except OSError as error:
            raise EmbedgeError(f"--texts {name}: {error.strerror or error}") from error
    lines, done = LogLines(), dict[str, int]()

    def told(step: str, count: int) -> None:
        done[step] = done.get(step, 0) + count
        if not args.quiet:
            lines.say(lambda: f"{step}: {done[step]:,}")

    found = fit_maps(
        args.bundle,
        texts,
        base=args.base,
        tasks=args.tasks,
        precisions=args.precisions,
        layers=args.layers,
        hidden=args.hidden,
        steps=args.steps,
        threads=args.threads,
        overwrite=args.overwrite,
        told=told,
    )
    rows = [["precision", "task", "texts", "cosine", "lowest", "top-10"]]
    rows += [
        [
            precision,
            f"{task}, the base" if task == args.base else task,
            f"{at['texts']:.0f}",
            f"{at['cosine_mean']:.5f}",
            f"{at['cosine_min']:.5f}",
            f"{at['top10_overlap']:.3f}" if "top10_overlap" in at else "",
        ]
        for precision, tasks in found.items()
        for task, at in tasks.items()
    ]
    print("\n".join(table(rows)))
    return 0
