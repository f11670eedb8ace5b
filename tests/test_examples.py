"""Every example in a docstring of a public name runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import linears, make_model, save, save_adapter

PUBLIC = ("embedge", "embedge.export", "embedge.runtime")


def documented() -> Iterator[tuple[str, str]]:
    """The docstrings of the public modules, their names, and these classes' members."""
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        yield module_name, module.__doc__ or ""
        for name in module.__all__:
            value: Any = getattr(module, name)
            members = vars(value) if inspect.isclass(value) else {}
            yield f"{module_name}.{name}", inspect.getdoc(value) or ""
            for member, function in members.items():
                if not member.startswith("_") and inspect.getdoc(function):
                    yield f"{module_name}.{name}.{member}", inspect.getdoc(function) or ""


def code(docstring: str) -> str:
    """The Python of a docstring: lines after ``>>>``, or an indented block that imports something."""
    prompted = doctest.script_from_examples(docstring) if ">>>" in docstring else ""
    blocks, block = [], list[str]()
    for line in [*docstring.splitlines(), "end"]:
        if line.startswith("    ") or not line:
            block.append(line)
        else:
            blocks.append(textwrap.dedent("\n".join(block)))
            block = []
    return prompted + "\n".join(b for b in blocks if "import " in b and ">>>" not in b)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the examples name: a model's folder and an adapter's."""
    save(make_model("bert"), tmp_path / "path/to/model")
    save_adapter(tmp_path / "path/to/model", tmp_path / "adapters/code", target=linears("bert"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("sources")
def test_examples_of_docstrings_run() -> None:
    examples = {name: source for name, text in documented() if (source := code(text).strip())}
    assert {*PUBLIC} <= {*examples}
    for name, source in examples.items():
        exec(compile(source, f"<example of {name}>", "exec"), {})
