"""The repository's documents, and the blocks of code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CODE",
    "DOCUMENTS",
    "FOLDERS",
    "NOTES",
    "ROOT",
    "Block",
    "blocks",
    "prose",
    "read",
    "without_code",
]

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("bench", "docs", "examples", "export", "quant", "runtime", "tests")
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / ".github").rglob("*.md"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")),
    ]
    if "node_modules" not in path.parts
)
NOTES = [name for name in DOCUMENTS if re.match(r"docs/lab-notes/\d", name)]
CODE = re.compile(r"`([^`]+)`")
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```",
    re.M | re.S,
)


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def prose(name: str) -> str:
    """A document without its blocks of code."""
    return without_code(read(name))


def without_code(text: str) -> str:
    """A document's text without its blocks of code."""
    return FENCE.sub("", text)


@dataclass(frozen=True)
class Block:
    """A block of code, the remark above it, and where it begins."""

    language: str
    mark: str
    body: str
    line: int


def blocks(name: str) -> list[Block]:
    text = read(name)
    return [
        Block(
            fence["language"],
            fence["mark"] or "",
            re.sub(rf"^{fence['indent']}", "", fence["body"], flags=re.M),
            text.count("\n", 0, fence.start("body")) + 1,
        )
        for fence in FENCE.finditer(text)
    ]
