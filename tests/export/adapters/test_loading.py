"""An adapter's folder is found, or what is wrong with it is named."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from embedge.export.adapters.adapter import Adapter
from embedge.export.errors import AdapterError
from tests.helpers.peft_models import QUERY, bert, edit_config, edit_weights, save_adapter


def test_a_folder_of_several_adapters_gives_the_one_of_the_name(tmp_path: Path) -> None:
    """PEFT puts ``default`` into the folder itself and all others into sub-folders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(bert(), LoraConfig(r=3, target_modules=["query"]))
        model.add_adapter("code", LoraConfig(r=5, target_modules=["query"]))
        model.save_pretrained(tmp_path)

    assert Adapter.load(tmp_path, "code").settings.r == 5
    assert Adapter.load(tmp_path, "default").settings.r == 3
    assert Adapter.load(tmp_path / "code", "another name").settings.r == 5


def test_a_folder_without_the_adapter_lists_those_it_has(tmp_path: Path) -> None:
    for name in ("code", "retrieval"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")

    with pytest.raises(AdapterError) as caught:
        Adapter.load(tmp_path, "chat")

    assert str(caught.value) == (
        f"{tmp_path}: expected an adapter_config.json here or in chat/, "
        "the sub-folders code, retrieval have one"
    )


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError, match="nowhere: expected an adapter_config.json .*, there is no such folder"
    ):
        Adapter.load(tmp_path / "nowhere", "code")


def test_pickled_weights_are_refused_with_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")

    with pytest.raises(
        AdapterError, match=r"only pickled weights \(adapter_model\.bin\).*save_file"
    ):
        Adapter.load(tmp_path, "code")


@pytest.mark.parametrize("content", ["", "[1]", "{"], ids=["empty", "a list", "cut off"])
def test_a_broken_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)

    with pytest.raises(
        AdapterError, match=r"adapter_config\.json: (is not JSON|expected a JSON object)"
    ):
        Adapter.load(tmp_path, "code")


@pytest.mark.slow
def test_truncated_and_missing_weights_are_named(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])

    with pytest.raises(
        AdapterError, match=r"adapter_model\.safetensors: not a complete safetensors file"
    ):
        Adapter.load(tmp_path / "adapter", "code")
    file.unlink()
    with pytest.raises(
        AdapterError, match=r"adapter_model\.safetensors: cannot be read: No such file"
    ):
        Adapter.load(tmp_path / "adapter", "code")


def test_the_hash_covers_weights_and_config(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    first = Adapter.load(tmp_path / "adapter", "code").sha256
    assert Adapter.load(tmp_path / "adapter", "another name").sha256 == first
    edit_config(tmp_path, lora_alpha=8)
    second = Adapter.load(tmp_path / "adapter", "code").sha256
    edit_weights(tmp_path, lambda t: t[f"{QUERY}.lora_B.weight"].add_(1))
    third = Adapter.load(tmp_path / "adapter", "code").sha256

    assert len({first, second, third}) == 3
