"""Draws pages into a PDF: texts, tables and charts that no training has seen."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from page_search.pages import draw_pages, render


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pdf", type=Path, help="file to write")
    parser.add_argument("--pages", type=int, default=40)
    parser.add_argument("--seed", type=int, default=9)
    options = parser.parse_args(arguments)
    pages = itertools.islice(draw_pages(options.seed, held_out=True), options.pages)
    images = [render(page, seed=5)[0] for page in pages]
    images[0].save(options.pdf, save_all=True, append_images=images[1:], quality=95)


if __name__ == "__main__":
    main()
