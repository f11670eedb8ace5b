"""``embedge pretrained``: a task's graph as a folder for sentence-transformers, optimum and fastembed."""

from __future__ import annotations

import argparse
from pathlib import Path

from embedge.export.writing.pretrained_folder import save_pretrained

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = (
        "Write a task's graph as a folder that sentence-transformers opens with backend=onnx, and optimum and "
        "fastembed too. It has the task's prompts, pooling and longest text. Graphs of fp32 and those of --portable "
        "run on any processor as they are."
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("out", metavar="OUT", help="the new folder, which must not exist")
    parser.add_argument("--task", help="may be left out where the bundle has exactly one")
    parser.add_argument("--precision", help="likewise")


def run(args: argparse.Namespace) -> int:
    """Writes the folder.

    Raises:
        EmbedgeError: as :func:`save_pretrained`.
    """
    out = save_pretrained(args.bundle, args.out, task=args.task, precision=args.precision)
    size = sum(file.stat().st_size for file in Path(out).rglob("*") if file.is_file())
    print(f"wrote {args.out} ({size / 1e6:.1f} MB)")
    return 0
