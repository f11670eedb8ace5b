"""``embedge families``: what can be exported."""

from __future__ import annotations

import argparse
import json

from embedge.export.families.supported import supported
from embedge.runtime.cli.table import table

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = (
        "List the architectures that can be exported, most of them a model_type of config.json, with a "
        "published model of each."
    )
    parser.add_argument("--json", action="store_true", help="one JSON document with all there is")
    parser.epilog = """examples:
  embedge families
  embedge families --json"""


def run(args: argparse.Namespace) -> int:
    """Prints them."""
    found = supported()
    if args.json:
        print(json.dumps({"families": [one._asdict() for one in found]}, indent=2))
    else:
        rows = [["architecture", "example"], *([one.architecture, one.example] for one in found)]
        print("\n".join(table(rows, labels=2)))
    return 0
