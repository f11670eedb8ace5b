"""``embedge push``: a bundle to the Hugging Face hub."""

from __future__ import annotations

import argparse

from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.licences import licence_name
from embedge.runtime.hub import HubFile, licences_of, push_bundle

__all__ = ["add_arguments", "print_files", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = (
        "Send a bundle to the Hugging Face hub, as one commit: what its manifest lists, and its card. A new "
        "repository is private. A push that was cut off goes on when it is run again. Log in with `hf auth login`."
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="the bundle's folder")
    add("repo_id", metavar="ORG/NAME", help="made where there is none")
    add(
        "--public",
        action="store_true",
        help="let everybody read it, and what the repository held before",
    )
    add(
        "--accept-license", "--accept-licence", dest="accept_licence", action="store_true",
        help="you have read the terms of the model and its adapters, and may pass it on; needed where one allows no "
        "commercial use, and with --public where one is not known to let everybody pass it on",
    )  # fmt: skip
    add("--revision", metavar="BRANCH", help="write to this branch (default: the main one)")
    add("--message", metavar="TEXT", help="of the commit")
    add("--dry-run", action="store_true", help="list what would be sent, without asking the hub")


def run(args: argparse.Namespace) -> int:
    """Sends the bundle, or says what that would be.

    Raises:
        EmbedgeError: as :func:`push_bundle`.
    """
    manifest = Bundle(args.bundle, verify="none").manifest
    for of, licence in licences_of(manifest).items():
        print(f"licence of {of}: {licence_name(licence)}")
    files = push_bundle(
        args.bundle,
        args.repo_id,
        public=args.public,
        accept_licence=args.accept_licence,
        revision=args.revision,
        message=args.message,
        dry_run=args.dry_run,
    )
    print_files(files)
    state = "public" if args.public else "private"
    print(
        f"{'would send' if args.dry_run else 'sent'} {len(files)} files to {args.repo_id} ({state})"
    )
    return 0


def print_files(files: list[HubFile]) -> None:
    """A line for each file, and their sum."""
    for file in files:
        print(f"{file.size:>14,}  {file.name}")
    print(f"{sum(file.size for file in files):>14,}  bytes")
