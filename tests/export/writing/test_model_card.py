"""A bundle's card says what it was made from, under which licences, and how it is used."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedge.export import export_bundle
from embedge.runtime import Embedder
from embedge.runtime.bundle.licences import described_licences, licence_name
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.cli.main import main
from tests.helpers.exports import manifest
from tests.helpers.models import make_model, save, save_adapter, write_json

PROMPTS = {"query": "Query: ", "document": "a | `b`\n"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without commercial use in a hub's cache, and three adapters, of which two have a card."""
    root = tmp_path_factory.mktemp("card")
    model = save(make_model("bert"), root / "models--org--tiny-1" / "snapshots" / "0a1b2c")
    (model / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Tiny\n")
    write_json(
        model / "config_sentence_transformers.json",
        {"prompts": PROMPTS, "default_prompt_name": "query"},
    )
    for name in ("code", "chat", "web"):
        folder = save_adapter(model, root / "adapters" / name, target=["query"])
        (folder / "README.md").unlink(missing_ok=True)
        if name != "web":
            (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return root


@pytest.fixture(scope="module")
def said(parts: Path) -> str:
    """What an export to ``out`` says on standard error."""
    text = io.StringIO()
    model = parts / "models--org--tiny-1" / "snapshots" / "0a1b2c"
    tasks = [f"--adapter={name}={parts / 'adapters' / name}" for name in ("code", "chat", "web")]
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
        call = ["export", str(model), *tasks, "--no-adapter", "bare", "--precision", "fp32"]
        assert main([*call, "--matryoshka", "16,32", "--out", str(parts / "out")]) == 0
    return text.getvalue()


@pytest.fixture(scope="module")
def card(parts: Path, said: str) -> str:
    return (parts / "out" / "README.md").read_text("utf-8")


def test_an_export_says_under_which_licences_the_model_and_its_adapters_are(said: str) -> None:
    assert said == (
        "embedge: licence of tiny-1: CC BY-NC 4.0 (no commercial use); adapters code, chat: mit; adapter web: not "
        "stated\n"
    )


def test_licences_and_the_hub_id_are_in_the_manifest_and_in_the_card(
    parts: Path, card: str
) -> None:
    document = manifest(parts / "out")
    assert document["source"]["license"] == "cc-by-nc-4.0"
    assert document["source"]["hub_id"] == "org/tiny-1"
    adapters = {name: task["adapter"] for name, task in document["tasks"].items()}
    stated = {name: adapter.get("license") for name, adapter in adapters.items() if adapter}
    assert stated == {"code": "mit", "chat": "mit", "web": None}
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == ["cc-by-nc-4.0", "mit"]
    assert front["base_model"] == "org/tiny-1"
    assert (
        "Licence of the weights: CC BY-NC 4.0 (no commercial use); adapters code, chat: mit."
        in card
    )


def test_it_has_the_prompts_with_their_texts(card: str) -> None:
    assert "| task | adapter | prompts (* where a call names none) |" in card
    said = r'document `"a \u007c \u0060b\u0060\n"`, query* `"Query: "`'
    assert f"| code | LoRA code, merged | {said} |" in card
    assert f"| bare | none (bare backbone) | {said} |" in card


def test_its_python_runs(parts: Path, card: str) -> None:
    (code,) = re.findall(r"```python\n(from embedge.*?)```", card, re.DOTALL)
    here, folders = re.subn(r'"path/to/this/folder"', repr(str(parts / "out")), code)
    assert folders == 1
    out, names = io.StringIO(), dict[str, Any]()
    with contextlib.redirect_stdout(out):
        exec(here, names)
    model = Embedder(parts / "out", task="code")
    scores, kind, shape = out.getvalue().splitlines()
    assert names["model"].similarity(names["queries"], names["documents"]).shape == (1, 2)
    assert kind == model.fingerprint(role="document")
    assert (names["queries"] == model.encode(["a question"], prompt="Query: ")).all()
    assert shape == "(1, 16)"
    assert scores.startswith("[[")


def test_a_bundle_without_prompts_dimensions_and_licences(tmp_path: Path) -> None:
    source = save(make_model("bert"), tmp_path / "tiny")
    out = export_bundle(source, adapters={"task": None}, precisions=["fp32"], out=tmp_path / "out")
    card = (out / "README.md").read_text("utf-8")
    assert "hub_id" not in manifest(out)["source"]
    assert "Licence of the weights: not stated.\n" in card
    assert (
        "| task | adapter | prompts |\n|---|---|---|\n| task | none (bare backbone) | none |"
        in card
    )
    assert "truncate_dim" not in card.split("## With other runtimes")[0]
    assert not {"license", "base_model"} & set(yaml.safe_load(card.split("---\n")[1]))


def test_the_hub_id_stays_when_a_task_is_added_from_a_copy(
    parts: Path, said: str, tmp_path: Path
) -> None:
    assert said
    copy = shutil.copytree(
        parts / "models--org--tiny-1" / "snapshots" / "0a1b2c", tmp_path / "tiny-1"
    )
    out = shutil.copytree(parts / "out", tmp_path / "out")
    export_bundle(copy, adapters={"more": None}, precisions=["fp32"], out=out)
    document = manifest(out)
    assert document["source"]["hub_id"] == "org/tiny-1"
    assert Manifest.from_dict(document).to_dict() == document


@pytest.mark.parametrize(
    ("licence", "name"),
    [
        ("cc-by-nc-4.0", "CC BY-NC 4.0 (no commercial use)"),
        ("cc-by-nc-sa-3.0", "CC BY-NC-SA 3.0 (no commercial use)"),
        ("cc-by-4.0", "CC BY 4.0"),
        ("apache-2.0", "apache-2.0"),
        ("qwen-research-non-commercial", "qwen-research-non-commercial (no commercial use)"),
        ("mit, cc-by-nc-4.0", "mit, cc-by-nc-4.0 (no commercial use)"),
        ("ncsa", "ncsa"),
        (None, "not stated"),
    ],
)
def test_a_licence_is_named_for_people(licence: str | None, name: str) -> None:
    assert licence_name(licence) == name
    assert described_licences(licence, {}) == name
