"""Documentation of other kinds: manual pages, Perl's POD and CMake's reference pages."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from textsplit import first_sentence, squeeze


@dataclass(frozen=True)
class Page:
    """One page of documentation.

    Attributes:
        name: Name of the page.
        group: A coarser unit that related pages share.
        summary: Its one-line description.
        body: The text that explains it.
    """

    name: str
    group: str
    summary: str
    body: str


_ARGUMENT = re.compile(r'"([^"]*)"|(\S+)')


def _plain_man(source: str) -> str:
    lines: list[str] = []
    for raw in source.split("\n"):
        line = raw
        if raw.startswith(('.\\"', "'\\\"")):
            continue
        macro = re.match(r"\.(\w+)\s*(.*)", raw)
        if macro and macro[1] in ("B", "I"):
            line = macro[2].replace('"', "")
        elif macro and macro[1] in ("BR", "BI", "IR", "RB", "RI", "IB"):
            line = "".join(quoted or bare for quoted, bare in _ARGUMENT.findall(macro[2]))
        elif macro:
            line = ""
        lines.append(line)
    text = "\n".join(lines)
    text = re.sub(r"\\f(?:\[\w*\]|\(\w\w|\w)|\\[&|^/,cd]|\\s[+-]?\d|\\%|\\:", "", text)
    text = text.replace("\\-", "-").replace("\\ ", " ").replace("\\(aq", "'").replace("\\e", "\\")
    text = re.sub(r"\\\((?:lq|rq|dq)|\\\*\([LR]\"?|\\\*\(C[+`']", '"', text)
    return re.sub(r"\\[(*]\w\w|\\\[\w+\]", " ", text)


def read_man_pages(root: Path, group: str) -> Iterator[Page]:
    """Yield the English manual pages of a package that have a NAME and a DESCRIPTION.

    Args:
        root: Files of the package.
        group: Name of the package.
    """
    for path in sorted(root.glob("usr/share/man/man*/*.gz")):
        source = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
        parts = re.split(r"(?m)^\.S[Hh]\s+(.*)$", source)
        sections = {
            title.strip().strip('"').upper(): body
            for title, body in zip(parts[1::2], parts[2::2], strict=True)
        }
        name_line = squeeze(_plain_man(sections.get("NAME", "")))
        body = squeeze(_plain_man(sections.get("DESCRIPTION", "")))
        if " - " in name_line:
            summary = name_line.split(" - ", 1)[1].strip()
            yield Page(path.name.split(".")[0], group, summary, body)


def _plain_pod(source: str) -> str:
    for _ in range(3):
        source = re.sub(r"[A-Z]<{1,2}\s?([^<>|]*\|)?([^<>]*?)\s?>{1,2}", r"\2", source)
    return source


def read_pod(root: Path) -> Iterator[Page]:
    """Yield Perl's documentation pages that have a NAME and a DESCRIPTION.

    Args:
        root: Files of the Perl packages.
    """
    for path in sorted([*root.rglob("*.pm"), *root.rglob("*.pod")]):
        source = path.read_text(encoding="utf-8", errors="ignore")
        name = re.search(r"(?m)^=head1 NAME\n+(.*?)\s+--?\s+(.*?)\n\n", source)
        body = re.search(r"(?ms)^=head1 DESCRIPTION\n+(.*?)(?=^=head1|^=cut|\Z)", source)
        if name and body:
            text = re.sub(r"(?m)^=.*$", "", body[1])
            yield Page(
                _plain_pod(name[1]),
                _plain_pod(name[1]).split("::")[0],
                squeeze(_plain_pod(name[2])),
                squeeze(_plain_pod(text)),
            )


def read_cmake_help(root: Path) -> Iterator[Page]:
    """Yield CMake's reference pages: the first sentence as summary, the rest as body.

    Args:
        root: Files of the package ``cmake-data``.
    """
    for path in sorted(root.rglob("Help/*/*.rst")):
        if path.parent.name in ("release", "manual", "generator", "include"):
            continue
        source = path.read_text(encoding="utf-8", errors="ignore")
        text = re.sub(r"(?m)^\S+\n[-=~*^]{3,}$|^\.\. .*$|^ +:\w+:.*$", "", source)
        text = re.sub(r":[\w:]+:`([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", text)
        paragraphs = [squeeze(p).replace("``", "") for p in re.split(r"\n\s*\n", text)]
        paragraphs = [p for p in paragraphs if len(p.split()) > 3]
        if len(paragraphs) >= 2:
            summary = first_sentence(paragraphs[0])
            yield Page(path.stem, path.parent.name, summary, " ".join(paragraphs[1:]))
