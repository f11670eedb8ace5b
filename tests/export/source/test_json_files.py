"""What is no JSON that a setting can be read from is refused with the file's name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from embedge.export import export_bundle
from embedge.export.adapters.adapter import Adapter
from embedge.export.errors import AdapterError, CheckpointError
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.json_files import read_json
from embedge.export.source.safetensors_file import SafetensorsFile
from embedge.runtime.bundle.json_object import parse_json
from tests.helpers.models import make_model, save

BAD: dict[str, tuple[bytes, str]] = {
    "nested deeply": (b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}", "nested deeper than 64 levels"),
    "nested a little too deeply": (b"[" * 65 + b"]" * 65, "nested deeper than 64 levels"),
    "a number beyond floats": (b"[" + b"9" * 401 + b"]", "a number of 401 digits"),
    "a key with two values": (b'{"a": 1, "a": 2}', "the key 'a' occurs twice, with different values"),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "surrogates not allowed"),
    "another encoding": ('{"a": "é"}'.encode("latin-1"), "can't decode byte 0xe9"),
    "text behind": (b"{} {}", "Extra data"),
    "nothing": (b"", "Expecting value"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_json_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    content, expected = BAD[kind]
    file = tmp_path / "config.json"
    file.write_bytes(content)

    with pytest.raises(CheckpointError, match=expected) as caught:
        read_json(file, CheckpointError)

    assert str(caught.value).startswith(f"{file}: is not JSON: ")


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"[" * 64 + b"1" + b"]" * 64, None),
        (b'{"a": 1, "a": 1}', {"a": 1}),
        (b'"\\ud83d\\ude00 \\u00e9"', "\N{GRINNING FACE} é"),
        (b"1000000000000000019884624838656", 1000000000000000019884624838656),
    ],
    ids=["64 levels", "the same twice", "a surrogate pair", "a tokenizer's no limit"],
)
def test_what_is_json_is_read(content: bytes, value: object) -> None:
    parsed = parse_json(content)

    assert value is None or parsed == value


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as sparse:
        sparse.truncate(20 << 30)

    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: expected at most"):
        read_json(file, CheckpointError)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_fifo_in_an_adapters_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)

    with pytest.raises(AdapterError, match=rf"{name}: .*found a FIFO"):
        Adapter.load(tmp_path, "code")


def test_a_fifo_as_a_models_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: .*FIFO"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["dangling link", "folder", "fifo"])
@pytest.mark.parametrize(
    "name",
    [
        *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
        *("tokenizer_config.json", "special_tokens_map.json", "model.safetensors"),
    ],
)
def test_a_file_that_cannot_be_read_is_never_taken_for_none(
    name: str, kind: str, tmp_path: Path
) -> None:
    """As a link of the hub's cache whose blob was never fetched."""
    source = save(make_model("bert"), tmp_path / "model")
    (source / name).unlink(missing_ok=True)
    if kind == "dangling link":
        (source / name).symlink_to(tmp_path / "nowhere")
    elif kind == "folder":
        (source / name).mkdir()
    else:
        os.mkfifo(source / name)
    if name == "special_tokens_map.json":
        settings = json.loads((source / "tokenizer_config.json").read_text())
        settings.pop("added_tokens_decoder", None)  # transformers 5 writes none
        (source / "tokenizer_config.json").write_text(json.dumps(settings))

    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read"):
        export_bundle(source, adapters={"task": None}, pooling="mean", out=tmp_path / "out")


def test_a_folder_as_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: expected a regular file"):
        SafetensorsFile(tmp_path, CheckpointError)
