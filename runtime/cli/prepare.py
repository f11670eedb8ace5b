"""``embedge prepare``: packs a bundle's graphs for this machine, and measures what is fastest on it."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator

from embedge.runtime.arguments import check_threads
from embedge.runtime.bundle.contract import VISION
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.cli.table import table
from embedge.runtime.errors import EmbedgeValueError, warn
from embedge.runtime.host.cores import available_cores
from embedge.runtime.sessions.prepared_graphs import PreparedGraphs
from embedge.runtime.sessions.session import SessionConfig, open_graph
from embedge.runtime.sessions.session_workers import RunSettings
from embedge.runtime.tuning.autotune import measure_precisions
from embedge.runtime.tuning.cache import TunedPrecision, Tuning, add_tuning, tuning_file
from embedge.runtime.tuning.prepack_graphs import prepack_graph

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = (
        "Store each graph as ONNX Runtime packs it for this processor, in the bundle's folder "
        "prepared/. Sessions then map it: they open faster, and processes share the memory. Then time "
        "every precision and the ways of running it, up to a minute each, and remember the fastest: "
        "later runs take it, and --precision auto chooses by it. Vectors stay as they are. Safe to "
        "delete; takes about twice a graph's bytes."
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("--precision", nargs="+", metavar="P", help="only these (default: all)")
    parser.add_argument("--task", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="cores to measure with, and to which the measurement applies (default: as for embed)",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--pack-only", action="store_true", help="measure nothing")
    only.add_argument("--measure-only", action="store_true", help="pack nothing")
    only.add_argument("--remove", action="store_true", help="delete what was prepared and measured")
    parser.epilog = """examples:
  embedge prepare bundle
  embedge prepare bundle --precision int8 --threads 4
  embedge prepare bundle --remove"""


def run(args: argparse.Namespace) -> int:
    """Packs the graphs and measures the precisions, or removes all of it.

    Raises:
        EmbedgeError: if the bundle cannot be read, or a graph cannot be prepared or run.
    """
    bundle = Bundle(args.bundle)
    if args.remove:
        print("removed" if PreparedGraphs(bundle).folders.remove() else "nothing was prepared")
        return 0
    threads = available_cores()
    if args.threads is not None:
        threads = check_threads("threads", args.threads)
    chosen = list(_chosen(bundle, args.precision, args.task))
    if not args.measure_only:
        _pack(bundle, chosen)
    if not args.pack_only:
        _measure(bundle, chosen, threads)
    return 0


def _pack(bundle: Bundle, graphs: Iterable[tuple[str, str]]) -> None:
    prepared = PreparedGraphs(bundle)
    place = prepared.folders.to_write()
    if place != prepared.folders.inside:
        print(f"{bundle.root} cannot be written: into {place}, where this user's programs find it")
    for precision, name in graphs:
        before = _seconds_to_open(bundle, precision, name, None)
        size = prepack_graph(prepared, precision, name)
        after = _seconds_to_open(bundle, precision, name, prepared)
        print(f"{precision}/{name}: {size / 1e6:.0f} MB, opens in {after:.2f} s (was {before:.2f})")


def _measure(bundle: Bundle, graphs: Iterable[tuple[str, str]], threads: int) -> None:
    """Times each precision with the first of its graphs, stores the times and prints them."""
    settings = bundle.manifest.precisions
    tasks: dict[str, str] = {}
    for precision, name in graphs:
        if name != VISION and "cpu" in settings[precision].devices:
            tasks.setdefault(precision, name)
    if not tasks:
        print("measured nothing: none of these precisions runs on the CPU")
        return
    _warn_if_busy(bundle, threads)
    measured: dict[str, TunedPrecision] = {}
    for found in measure_precisions(bundle, tasks, threads=threads):
        add_tuning(bundle, threads, found)
        measured |= found
    count = "1 thread" if threads == 1 else f"{threads} threads"
    print(f"measured on {count}, milliseconds by texts x tokens, into {tuning_file(bundle)}:")
    print("\n".join(_times_table(measured)))


def _warn_if_busy(bundle: Bundle, threads: int) -> None:
    """Warns where others keep the cores busy: times and what follows from them are then by chance."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load >= (os.cpu_count() or 1) + 1:  # packing alone, just before, loads the cores
        warn(
            f"the machine is busy (load {load:.1f} on {os.cpu_count()} cores), and times will be off; "
            f"run `embedge prepare {bundle.root} --measure-only --threads {threads}` when it is quiet"
        )


def _times_table(measured: Tuning) -> list[str]:
    shapes = list(dict.fromkeys(s for found in measured.values() for s in found.milliseconds))
    rows = [["precision", *shapes, "MB", "runs"]]
    for precision, found in measured.items():
        times = [_shown(found.milliseconds[s]) if s in found.milliseconds else "-" for s in shapes]
        rows.append([precision, *times, f"{found.graph_bytes / 1e6:.0f}", _words(found.settings)])
    return table(rows)


def _shown(milliseconds: float) -> str:
    """Three digits, and no exponent: 4.25, 42.5, 425, 4250."""
    return f"{milliseconds:.3g}" if milliseconds < 999.5 else f"{milliseconds:.0f}"


def _words(settings: RunSettings) -> str:
    """How batches run, and where each has one thread what a text alone does."""
    batches = f"batches of {settings.batch_tokens} tokens"
    if not settings.single_thread:
        return f"{batches} on all threads, one by one"
    short = settings.single_thread_tokens
    alone = f"of up to {short} tokens on 1 thread" if short else "on all threads"
    return f"{batches} on 1 thread each, at the same time; a text alone {alone}"


def _chosen(
    bundle: Bundle, precisions: list[str] | None, tasks: list[str] | None
) -> Iterator[tuple[str, str]]:
    manifest = bundle.manifest
    for kind, wanted, known in (
        ("precision", precisions, manifest.precisions),
        ("task", tasks, manifest.tasks),
    ):
        unknown = [name for name in wanted or () if name not in known]
        if unknown:
            raise EmbedgeValueError(
                f"the bundle has no {kind} {', '.join(map(repr, unknown))}; it has {', '.join(known)}"
            )
    for precision, settings in manifest.precisions.items():
        if precisions is None or precision in precisions:
            chosen = [name for name in settings.graphs if tasks is None or name in tasks]
            names = list(dict.fromkeys(bundle.graph_key(precision, name) for name in chosen))
            vision = [VISION] if settings.vision and names else []
            yield from ((precision, name) for name in [*names, *vision])


def _seconds_to_open(
    bundle: Bundle, precision: str, name: str, prepared: PreparedGraphs | None
) -> float:
    begin = time.perf_counter()
    config = SessionConfig(threads=available_cores(), prepared=prepared)
    open_graph(bundle, precision, name, config, threads=1)
    return time.perf_counter() - begin
