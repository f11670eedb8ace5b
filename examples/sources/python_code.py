"""Documented Python functions: the docstring on one side, the bare source on the other."""

from __future__ import annotations

import ast
import io
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "__pycache__", "_vendor", "vendor"}


@dataclass(frozen=True)
class Function:
    """One documented function or method.

    Attributes:
        module: Path of its file below the root; the unit of the train/held-out split.
        docstring: The cleaned docstring.
        code: The dedented source without docstring, comments and blank lines.
    """

    module: str
    docstring: str
    code: str


def _without_comments(source: str) -> str:
    lines = source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _bare_source(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    docstring = node.body[0]
    end = node.end_lineno or node.lineno
    kept = lines[node.lineno - 1 : docstring.lineno - 1]
    kept += lines[docstring.end_lineno or docstring.lineno : end]
    return _without_comments(textwrap.dedent("\n".join(kept)) + "\n")


def _functions_of(path: Path, module: str) -> Iterator[Function]:
    text = path.read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if not docstring or not docstring.isascii():
            continue
        try:
            code = _bare_source(lines, node)
        except (tokenize.TokenError, IndentationError):
            continue
        if code.count("\n") >= 2 and code.isascii():
            yield Function(module, docstring, code)


def read_functions(root: Path) -> Iterator[Function]:
    """Yield the documented functions of every Python file below ``root``, tests left out.

    Args:
        root: A folder of Python modules, such as the standard library's.
    """
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(module.parts) or path.name.startswith("test_"):
            continue
        try:
            yield from _functions_of(path, module.as_posix())
        except (SyntaxError, UnicodeDecodeError, RecursionError):
            continue
