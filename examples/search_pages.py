"""Searches the pages of a PDF: one vector a page beside one vector a token.

Works with every bundle that embeds images and has multi-vectors. Reading PDF needs pypdfium2:
``pip install pypdfium2``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embedge import Embedder

Floats = NDArray[np.float32]


def pages_of(pdf: Path, width: int) -> list[Image.Image]:
    """Return the pages of a PDF as RGB images.

    Args:
        pdf: the file.
        width: of each image, in pixels.
    """
    import pypdfium2

    with pypdfium2.PdfDocument(pdf) as document:
        return [
            page.render(scale=width / page.get_width()).to_pil().convert("RGB") for page in document
        ]


@dataclass(frozen=True)
class Index:
    """The vectors of pages.

    Attributes:
        single: float32 ``[pages, dim]``, of length 1.
        multi: float32 ``[tokens, dim]`` of each page.
    """

    single: Floats
    multi: list[Floats]


def index(model: Embedder, pages: Sequence[Image.Image]) -> Index:
    """Return both kinds of vectors of pages."""
    return Index(model.encode_image(pages), list(model.encode_image(pages, multi_vector=True)))


def search(model: Embedder, found: Index, question: str) -> tuple[Floats, Floats]:
    """Return each page's score for a question, float32 ``[pages]`` twice.

    Returns:
        Cosines of single vectors, and MaxSim of multi-vectors over the number of the question's
        tokens.
    """
    vector = model.encode_query([question])
    tokens = model.encode_query([question], multi_vector=True)
    late = model.similarity(tokens, found.multi)[0] / len(tokens[0])
    return model.similarity(vector, found.single)[0], late


def main(arguments: Sequence[str] | None = None) -> None:
    """Embed the pages, answer the questions, and write the page that answers the last one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pdf", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--task", default="retrieval")
    parser.add_argument("--width", type=int, default=140, help="of a page in pixels")
    parser.add_argument("--top", type=int, default=3, help="pages that are listed")
    parser.add_argument("--out", type=Path, default=Path("best.png"), help="takes the best page")
    options = parser.parse_args(arguments)
    model = Embedder(options.bundle, precision=options.precision, task=options.task)
    pages = pages_of(options.pdf, options.width)
    found = index(model, pages)
    for question in options.questions:
        print(question)
        scores = search(model, found, question)
        for name, values in zip(("one vector a page", "one vector a token"), scores, strict=True):
            best = np.argsort(-values, kind="stable")[: options.top]
            listed = ", ".join(f"page {row + 1} ({values[row]:.2f})" for row in best)
            print(f"    {name}: {listed}")
        pages[int(scores[1].argmax())].save(options.out)


if __name__ == "__main__":
    main()
