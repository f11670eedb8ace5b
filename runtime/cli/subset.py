"""``embedge subset``: a smaller bundle of some precisions and tasks."""

from __future__ import annotations

import argparse

from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.subset import subset_bundle

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = (
        "Write a complete bundle of some of a bundle's precisions and tasks. Files are copied whole: what "
        "tasks share keeps what only the others use. Links become files, so without a choice this copies a "
        "bundle out of the hub's cache."
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="the whole bundle's folder")
    parser.add_argument("out", metavar="OUT", help="the new bundle's folder, which must not exist")
    parser.add_argument("--precision", nargs="+", metavar="P", help="only these (default: all)")
    parser.add_argument("--task", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument(
        "--link", action="store_true", help="make hard links instead of copies, on the same disk"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the bundle and says what it holds.

    Raises:
        EmbedgeError: as :func:`subset_bundle`.
    """
    out = subset_bundle(
        args.bundle, args.out, precisions=args.precision, tasks=args.task, link=args.link
    )
    whole, part = Bundle(args.bundle, verify="none"), Bundle(out)
    for precision, settings in part.manifest.precisions.items():
        print(f"{precision}: {', '.join(settings.graphs)}")
    size, before = (sum(f.size for f in b.manifest.files.values()) for b in (part, whole))
    print(f"wrote {args.out} ({size / 1e6:.1f} MB of {before / 1e6:.1f})")
    return 0
