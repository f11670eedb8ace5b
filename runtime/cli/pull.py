"""``embedge pull``: a bundle from the Hugging Face hub."""

from __future__ import annotations

import argparse

from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.licences import licence_name
from embedge.runtime.cli.push import print_files
from embedge.runtime.hub import licences_of, pull_bundle

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = (
        "Fetch a bundle from the Hugging Face hub, or some of its precisions and tasks, with every file's SHA-256 "
        "compared. A pull that was cut off goes on when it is run again, with the files that are missing."
    )
    add = parser.add_argument
    add("repo_id", metavar="ORG/NAME", help="as `embedge push` was given it")
    add("out", metavar="OUT", help="the new bundle's folder, which must not exist")
    add("--revision", metavar="NAME", help="a branch, a tag or a commit (default: the main branch)")
    add("--precision", nargs="+", dest="precisions", metavar="P", help="only these (default: all)")
    add("--task", nargs="+", dest="tasks", metavar="NAME", help="only these (default: all)")
    add("--dry-run", action="store_true", help="list what would be fetched")


def run(args: argparse.Namespace) -> int:
    """Fetches the bundle, or says what that would be.

    Raises:
        EmbedgeError: as :func:`pull_bundle`.
    """
    files = pull_bundle(
        args.repo_id,
        args.out,
        revision=args.revision,
        precisions=args.precisions,
        tasks=args.tasks,
        dry_run=args.dry_run,
    )
    print_files(files)
    if args.dry_run:
        return 0
    for of, licence in licences_of(Bundle(args.out, verify="none").manifest).items():
        print(f"licence of {of}: {licence_name(licence)}")
    print(f"wrote {args.out}")
    return 0
