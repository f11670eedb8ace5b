"""``embedge prepare``: packs a bundle's graphs for this machine once, so that they open faster."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from embedge.runtime._bundle import Bundle
from embedge.runtime._cores import available_cores
from embedge.runtime._cpu import saturates_u8s8
from embedge.runtime._errors import EmbedgeValueError
from embedge.runtime._graphs import graph_inputs
from embedge.runtime._manifest import VISION
from embedge.runtime._prepared import PreparedGraphs
from embedge.runtime._session import GraphSession

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = (
        "Store each graph as ONNX Runtime packs it for this processor, in the bundle's folder "
        "prepared/. Sessions then map it: they open faster, and processes share the memory. Safe to "
        "delete; takes about twice a graph's bytes."
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("--precision", nargs="+", metavar="P", help="only these (default: all)")
    parser.add_argument("--task", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--remove", action="store_true", help="delete what was prepared")


def run(args: argparse.Namespace) -> int:
    """Prepares the graphs, or removes them.

    Raises:
        EmbedgeError: if the bundle cannot be read or a graph cannot be prepared.
    """
    bundle = Bundle(args.bundle)
    prepared = PreparedGraphs(bundle)
    if args.remove:
        print("removed" if prepared.remove() else "nothing was prepared")
        return 0
    for precision, name in _chosen(bundle, args.precision, args.task):
        settings = bundle.manifest.precisions[precision]
        if settings.activation_constants and saturates_u8s8():
            print(f"{precision}/{name}: left as it is: this processor needs its 7-bit constants")
            continue
        before = _seconds_to_open(bundle, precision, name, None)
        size = prepared.write(precision, name)
        after = _seconds_to_open(bundle, precision, name, prepared)
        print(f"{precision}/{name}: {size / 1e6:.0f} MB, opens in {after:.2f} s (was {before:.2f})")
    return 0


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
            names = [name for name in settings.graphs if tasks is None or name in tasks]
            vision = [VISION] if settings.vision and names else []
            yield from ((precision, name) for name in [*names, *vision])


def _seconds_to_open(
    bundle: Bundle, precision: str, name: str, prepared: PreparedGraphs | None
) -> float:
    begin = time.perf_counter()
    GraphSession(
        bundle.graph(precision, name),
        device="cpu",
        threads=1,
        constants=bundle.manifest.precisions[precision].activation_constants,
        inputs=graph_inputs(bundle.manifest, precision, name),
        prepared=prepared.find(precision, name) if prepared else None,
        unpack=lambda: bundle.unpacked(precision, name, threads=available_cores()),
    )
    return time.perf_counter() - begin
