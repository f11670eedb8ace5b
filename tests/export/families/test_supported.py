"""What can be exported is listed, with a published model of each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from embedge.export.families import FAMILIES, Family
from embedge.export.families.supported import Supported, supported
from embedge.runtime.cli.main import main
from tests.helpers.command import Capture

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_family_names_a_published_model_of_each_of_its_architectures(
    family: type[Family],
) -> None:
    assert set(family.model_types) <= set(family.examples)
    names = family.examples.values()
    assert [name for name in names if not re.fullmatch(r"[\w.-]+/[\w.-]+", name)] == []


def test_the_command_lists_every_architecture(capsys: Capture) -> None:
    assert main(["families"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [[one.architecture, one.example] for one in supported()]
    assert {kind for family in FAMILIES for kind in family.model_types} == {a for a, _ in lines}


def test_the_command_gives_json(capsys: Capture) -> None:
    assert main(["families", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["families"]
    bert = next(one for one in listed if one["architecture"] == "bert")
    assert bert == {
        "architecture": "bert",
        "family": "Bert",
        "about": "BERT and its relatives with absolute positions",
        "example": "sentence-transformers/all-MiniLM-L6-v2",
    }


@pytest.mark.parametrize("one", supported(), ids=lambda one: one.architecture)
def test_every_architecture_is_on_the_page(one: Supported) -> None:
    page = (ROOT / "docs" / "reference" / "supported-models.md").read_text("utf-8")
    assert f"| `{one.architecture}` | {one.example} |" in page, "run python docs/hooks.py"
