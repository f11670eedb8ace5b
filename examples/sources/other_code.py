"""Functions of other programming languages, each with the comment that stands before it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from textsplit import first_sentence, squeeze


@dataclass(frozen=True)
class Language:
    """How to find commented functions in one language.

    Attributes:
        suffixes: File name endings.
        comment: Matches one whole leading comment; indentation is allowed before it.
        opening: Matches the first line of a definition, from its start.
        closing: ``"}"`` for bodies in braces, ``"end"`` for bodies closed by indentation.
    """

    suffixes: tuple[str, ...]
    comment: re.Pattern[str]
    opening: re.Pattern[str]
    closing: str


_BLOCK = re.compile(r"^[ \t]*/\*\*(?P<text>.*?)\*/[ \t]*\n", re.MULTILINE | re.DOTALL)
_SLASHES = re.compile(r"^(?P<text>(?:[ \t]*//[^\n]*\n)+)", re.MULTILINE)
_HASHES = re.compile(r"^(?P<text>(?:[ \t]*#[^\n]*\n)+)", re.MULTILINE)

LANGUAGES = {
    "javascript": Language(
        (".js", ".mjs"),
        _BLOCK,
        re.compile(
            r"[ \t]*(?:(?:export |default |async |static )*function\b|(?:var|const|let) \w+ = "
            r"(?:\w+\()?(?:async )?(?:function|\([^)]*\) =>)|"
            r"[\w.]+ = (?:\w+\()?(?:async )?function|"
            r"(?:static |async )*\w+ ?\([^)]*\) \{)"
        ),
        "}",
    ),
    "go": Language((".go",), _SLASHES, re.compile(r"func "), "}"),
    "perl": Language((".pm", ".pl"), _HASHES, re.compile(r"sub \w+"), "}"),
    "ruby": Language((".rb",), _HASHES, re.compile(r"[ \t]*def \w"), "end"),
}


def _comment_text(raw: str) -> str:
    lines = [re.sub(r"^[ \t]*(?:\*|//+|#+)? ?", "", line).rstrip() for line in raw.split("\n")]
    text = "\n".join(lines).strip("\n")
    text = re.split(r"\n\s*\n|(?:^|\n)\s*(?:@|=+\s|-{3,}|call-seq)", text.strip())[0]
    return squeeze(re.sub(r"\{@\w+ ([^}]*)\}|[`*+]", r"\1", text))


def _body(text: str, start: int, closing: str) -> str:
    if closing == "end":
        indent = re.match(r"[ \t]*", text[start:])
        found = re.compile(rf"^{indent.group() if indent else ''}end\b", re.MULTILINE)
        last = found.search(text, start)
        return text[start : last.end()] if last else ""
    depth = 0
    for match in re.finditer(r"[{}]|\n\n\n", text[start : start + 6000]):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start : start + match.end()] if match.group() == "}" else ""
    return ""


def _without_comments(code: str, language: Language) -> str:
    if language.comment is _HASHES:
        code = re.sub(r"(?m)(?:^|\s)#[^\n'\"]*$", "", code)
    else:
        code = re.sub(r"(?s)/\*.*?\*/", "", code)
        code = re.sub(r"(?m)(?:^|\s)//[^\n]*$", "", code)
    lines = [line.rstrip() for line in code.split("\n") if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    return "\n".join(line[indent:] for line in lines)


def read_commented_functions(root: Path, name: str) -> Iterator[tuple[str, str]]:
    """Yield the first sentence of a leading comment and the function after it.

    Args:
        root: Folder searched for source files.
        name: Key of ``LANGUAGES``.
    """
    language = LANGUAGES[name]
    for path in sorted(p for p in root.rglob("*") if p.suffix in language.suffixes):
        if not path.is_file() or re.search(r"\.min\.|_test\.|/tests?/|testdata|/t/", str(path)):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for comment in language.comment.finditer(text):
            if not language.opening.match(text, comment.end()):
                continue
            query = first_sentence(_comment_text(comment["text"]))
            code = _without_comments(_body(text, comment.end(), language.closing), language)
            long_enough = len(query.split()) >= 4 and code.count("\n") >= 2
            if long_enough and query.isascii() and code.isascii() and query[0].isalpha():
                yield query, code
