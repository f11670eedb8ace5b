"""Prints what a bundle of the page model finds, as JSON: held-out pages, alike texts, code."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from page_search.evaluate import code_search, held_out, matching, page_search

from embedge import Embedder, EmbedgeError


def main() -> None:
    """Measure each precision that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--pages", type=int, default=300, help="and as many questions")
    parser.add_argument("--crossed", action="store_true", help="each adapter on each task")
    options = parser.parse_args()
    try:
        models = [Embedder(options.bundle, precision=name) for name in options.precision]
    except EmbedgeError as error:
        raise SystemExit(f"error: {error}") from None
    data = held_out(options.pages)
    for precision, model in zip(options.precision, models, strict=True):
        found: dict[str, Any] = {"pages": page_search(model, data), "matching": matching(model)}
        found["code"] = code_search(model)
        if options.crossed:
            for task in model.tasks:
                pages = page_search(model, data, task)
                found[task] = {"single": pages["single"][192], "multi": pages["multi"]}
                found[task] |= {"matching": matching(model, task), "code": code_search(model, task)}
        print(json.dumps({"precision": precision, **found}), flush=True)


if __name__ == "__main__":
    main()
