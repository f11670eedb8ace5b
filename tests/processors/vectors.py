"""How far vectors of a bundle differ between processors: ``python -m tests.processors.vectors``.

``embed BUNDLE --out A.npz`` embeds some of the eval texts at each precision, where it runs. ``compare A.npz B.npz``
prints a Markdown table, each file beside the first. Needs the runtime alone, so that it runs under emulation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime import Embedder
from embedge.runtime.kernels.library import describe_kernels

Vectors = Mapping[str, NDArray[np.float32]]

TEXTS = Path(__file__).resolve().parents[2] / "examples/eval/retrieval.jsonl"
LONGEST = 160  # characters: emulated processors are slow


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="tests.processors.vectors", description=__doc__)
    commands = parser.add_subparsers(required=True)
    embed = commands.add_parser("embed")
    embed.add_argument("bundle", type=Path)
    embed.add_argument("--out", type=Path, required=True)
    embed.add_argument("--precision", nargs="+", default=["fp32", "int8", "int4"])
    embed.add_argument("--texts", type=int, default=64)
    embed.set_defaults(run=_embed)
    compare = commands.add_parser("compare")
    compare.add_argument("files", type=Path, nargs="+")
    compare.set_defaults(run=lambda options: print(table(options.files)))
    options = parser.parse_args(arguments)
    options.run(options)


def _embed(options: argparse.Namespace) -> None:
    texts = some_texts(options.texts)
    print(describe_kernels())
    vectors: dict[str, Any] = {}
    for precision in options.precision:
        embedder = Embedder(options.bundle, precision=precision, threads=1)
        vectors[precision] = embedder.encode(texts)
        np.savez(options.out, **vectors)  # what is done, as the next takes minutes under emulation


def some_texts(count: int) -> list[str]:
    """The first short texts, queries and passages in turn."""
    lines = [json.loads(line) for line in TEXTS.read_text("utf-8").splitlines()]
    texts = [line[kind] for line in lines for kind in ("query", "passage")]
    return [text for text in texts if len(text) <= LONGEST][:count]


def table(files: Sequence[Path]) -> str:
    """A Markdown table: a row for each file after the first, a column for each precision."""
    first, *others = (dict(np.load(file)) for file in files)
    lines = [
        f"| beside {files[0].stem} | " + " | ".join(first) + " |",
        "|---" * (1 + len(first)) + "|",
    ]
    for file, other in zip(files[1:], others, strict=True):
        cells = [difference(vectors, other[name]) for name, vectors in first.items()]
        lines.append(f"| {file.stem} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> str:
    """The median and the largest of 1 - cosine of normalized vectors ``[texts, dim]``, or that they are the same."""
    if np.array_equal(one, other):
        return "bit-identical"
    # Half the squared distance of vectors of length 1, which rounds nothing away.
    apart = ((one.astype(np.float64) - other) ** 2).sum(axis=1) / 2
    return f"{np.median(apart):.1e}, at most {apart.max():.1e}"


if __name__ == "__main__":
    main()
