"""examples/distill_base.py: an adapter from which matrices give other adapters' vectors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distill_base import distill, main

from embedge.export import export_bundle
from tests.helpers.models import make_model, save, save_adapter, write_json


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of small products beside other workers would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = make_model("bert")
    folder = save(model, tmp_path / "model")
    pooling = {"pooling_mode": "mean", "embedding_dimension": model.config.hidden_size}
    write_json(folder / "1_Pooling/config.json", pooling)
    return folder


@pytest.fixture
def adapters(source: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        name: save_adapter(source, tmp_path / name, target=["query", "value"], seed=seed, r=rank)
        for name, seed, rank in (("a", 1, 3), ("b", 2, 5))
    }


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    files = {}
    for name, shift in (("a", 0), ("b", 7)):
        rows = [
            {"first": f"w{i % 50} w{(i * 3 + shift) % 50}", "second": f"w{i % 11}", "score": 0.5}
            for i in range(40)
        ]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.mark.slow
def test_it_comes_nearer_to_each_and_can_be_exported(
    source: Path, adapters: dict[str, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    rows = {
        name: [json.loads(line)["first"] for line in file.read_text().splitlines()]
        for name, file in texts.items()
    }
    far = distill(source, tmp_path / "base", adapters, rows, steps=120, batch_size=16)
    for name, (first, last) in far.items():
        assert last < 0.93 * first, name
    export_bundle(
        source, adapters={"all": tmp_path / "base"}, precisions=["fp32"], out=tmp_path / "bundle"
    )


def test_the_command(
    source: Path, adapters: dict[str, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    call = [str(source), str(tmp_path / "base"), "--steps", "2", "--batch-size", "8"]
    for name, folder in adapters.items():
        call += ["--adapter", f"{name}={folder}", "--texts", f"{name}={texts[name]}"]
    main(call)
    config = json.loads((tmp_path / "base" / "adapter_config.json").read_text())
    assert (config["r"], config["peft_type"]) == (8, "LORA")
    weights = sorted(path.name for path in (tmp_path / "base").iterdir())
    assert weights == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--texts", "c=FILE"], "--texts c: expected a task of --adapter: a, b"),
        (["--texts", "a=missing"], "'a=missing': expected NAME=PATH of something that is there"),
        (["--batch-size", "500"], "--texts a: expected at least 500 texts, found 80"),
    ],
)
def test_what_is_wrong_is_named(
    source: Path,
    adapters: dict[str, Path],
    texts: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    call = [str(source), str(tmp_path / "base")]
    for name, folder in adapters.items():
        call += ["--adapter", f"{name}={folder}", "--texts", f"{name}={texts[name]}"]
    call += [word.replace("FILE", str(texts["a"])) for word in change]
    with pytest.raises(SystemExit, match="2"):
        main(call)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "base").exists()
    assert torch.is_grad_enabled()
