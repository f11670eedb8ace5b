"""An adapter is warned of, or refused, on another model than it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embedge.export.adapters.adapter import Adapter
from embedge.export.errors import AdapterError
from embedge.export.source.checkpoint import Checkpoint
from tests.helpers.peft_models import bind, canonical, edit_config, edit_weights, save_adapter


def test_an_untrained_adapter_is_a_warning(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"])
    edit_weights(tmp_path, lambda t: [t[key].zero_() for key in t if "lora_B" in key])

    with pytest.warns(
        UserWarning,
        match=r"^adapter 'code': B·A is zero in every layer, so its LoRA changes nothing; was",
    ):
        bound = bind(tmp_path)

    assert not bound.touched


def test_another_base_name_is_a_warning(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    edit_config(tmp_path, base_model_name_or_path="someone/other-model")

    with pytest.warns(
        UserWarning,
        match=r"^adapter 'code' was trained on 'other-model', it is merged into 'base'$",
    ):
        bind(tmp_path)


OWN_NAMES = [
    "org/Tiny-BERT",
    "/home/someone/tiny-bert/",
    r"C:\models\tiny-bert",
    "/cache/models--org--tiny-bert/snapshots/0123456789abcdef0123456789abcdef01234567",
]


@pytest.mark.parametrize("recorded", OWN_NAMES)
def test_the_bases_own_name_is_silent(recorded: str, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    (tmp_path / "base").rename(tmp_path / "tiny-bert")
    edit_config(tmp_path, base_model_name_or_path=recorded)

    Adapter.load(tmp_path / "adapter", "code").bind(
        Checkpoint(tmp_path / "tiny-bert"), canonical
    )  # warnings are errors here


def test_the_bases_own_folder_is_silent_whatever_its_name(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    (tmp_path / "base").rename(tmp_path / "model")
    edit_config(tmp_path, base_model_name_or_path=str(tmp_path / "adapter" / ".." / "model"))

    Adapter.load(tmp_path / "adapter", "code").bind(Checkpoint(tmp_path / "model"), canonical)


NO_NAMES = [
    *(
        None,
        "",
        "model",
        "./model/",
        "/tmp/x/model",
        "/runs/7/checkpoint-1500",
        "output",
        "../base",
        ".",
    ),
    *("final_model", "/tmp/tmp8xk_2ab1", "my_model", "best-checkpoint", "merged_model", "12"),
]


@pytest.mark.slow
@pytest.mark.parametrize("recorded", NO_NAMES)
def test_a_base_name_that_says_nothing_is_a_warning(recorded: str | None, tmp_path: Path) -> None:
    save_adapter(tmp_path)
    (tmp_path / "base").rename(tmp_path / "model")
    edit_config(tmp_path, base_model_name_or_path=recorded)
    adapter = Adapter.load(tmp_path / "adapter", "code")
    checkpoint = Checkpoint(tmp_path / "model")

    with pytest.warns(
        UserWarning, match="^adapter 'code' does not say which model it was trained on"
    ):
        adapter.bind(checkpoint, canonical)

    edit_config(tmp_path, embedge_base_sha256=checkpoint.sha256())
    Adapter.load(tmp_path / "adapter", "code").bind(checkpoint, canonical)  # the hash says it


def test_the_name_of_a_models_parent_is_not_its_own(tmp_path: Path) -> None:
    """A fine-tuned model's config.json often names what it was tuned from."""
    save_adapter(tmp_path)
    config = tmp_path / "base" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "_name_or_path": "org/parent-v1"})
    )
    edit_config(tmp_path, base_model_name_or_path="org/parent-v1")
    adapter = Adapter.load(tmp_path / "adapter", "code")
    adapter.bind(Checkpoint(tmp_path / "base"), canonical)  # nothing else names it

    (tmp_path / "base" / "README.md").write_text("# org/child-v1\n")

    with pytest.warns(
        UserWarning, match="was trained on 'parent-v1', it is merged into 'child-v1'"
    ):
        adapter.bind(Checkpoint(tmp_path / "base"), canonical)


def test_a_recorded_base_hash_is_checked(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    found = Checkpoint(tmp_path / "base").sha256()
    edit_config(tmp_path, embedge_base_sha256=found)
    bind(tmp_path)
    edit_config(tmp_path, embedge_base_sha256="0" * 64)

    with pytest.raises(
        AdapterError,
        match=f"trained on base weights with the sha256 {'0' * 64}, these have {found}",
    ):
        bind(tmp_path)


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [
        ("org/name", "org/name"),
        ("/home/someone/name", "name"),
        ("./name", "name"),
        ("name", "name"),
        (None, None),
    ],
)
def test_the_base_model_is_shown_without_paths_of_a_machine(
    recorded: str | None, shown: str, tmp_path: Path
) -> None:
    save_adapter(tmp_path)
    edit_config(tmp_path, base_model_name_or_path=recorded)

    assert Adapter.load(tmp_path / "adapter", "code").base_model == shown
