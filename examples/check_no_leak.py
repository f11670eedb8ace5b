"""Proves that no held-out text was trained on: no equal text, and few shared runs of words."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from jsonl import read_jsonl
from textsplit import Shingles, normal_form

HERE = Path(__file__).resolve().parent
LIMIT = 0.5

_FIELDS = ("query", "passage", "text1", "text2", "text")


def _texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row[field] for row in rows for field in _FIELDS if field in row]


def main() -> int:
    """Return 0 where the sets are apart, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--eval", type=Path, default=HERE / "eval")
    options = parser.parse_args()
    held_out: list[str] = []
    for path in sorted(options.eval.glob("*.jsonl")):
        held_out.extend(_texts(read_jsonl(path)))
    known, near = {normal_form(text) for text in held_out}, Shingles(held_out)
    files = sorted(options.data.glob("*.jsonl"))
    if not held_out or not files:
        print(f"expected *.jsonl in {options.eval} and {options.data}; run build_data.py first")
        return 1
    failed = False
    for path in files:
        texts = _texts(read_jsonl(path))
        equal = sum(normal_form(text) in known for text in texts)
        close = sum(near.overlap(text) >= LIMIT for text in texts)
        failed = failed or bool(equal or close)
        print(f"{path.name}: {len(texts)} texts, {equal} held out, {close} nearly so")
    print("leak found" if failed else f"no leak among {len(held_out)} held-out texts")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
