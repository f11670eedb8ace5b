"""Decoders with a multi-vector head: both outputs are those of transformers with PEFT, unmerged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer

from embedge.export import CheckpointError, export_bundle
from embedge.runtime import Embedder
from tests.helpers.models import cosines, load_base, make_model, random_texts, save, write_json
from tests.helpers.sessions import open_graph

BOUND = 0.999999
WIDTH = 12
HEAD = "multi_vector_projector"
TEXTS = random_texts(24)
ADAPTED = rf".*layers.*\.([qkvo]_proj|(gate|up|down)_proj)|{HEAD}"


class WithHead(torch.nn.Module):
    """What a user of such a checkpoint has in torch."""

    def __init__(self, source: Path) -> None:
        super().__init__()
        self.name_or_path = str(source)  # PEFT records it
        self.model = load_base(source)
        stored = load_file(source / "model.safetensors")
        self.multi_vector_projector = torch.nn.Linear(32, WIDTH)
        self.multi_vector_projector.weight.data = stored[f"{HEAD}.weight"]
        self.multi_vector_projector.bias.data = stored[f"{HEAD}.bias"]

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        return states, self.multi_vector_projector(states)


def make_source(name: str, folder: Path, **config: Any) -> Path:
    generator = torch.Generator().manual_seed(5)
    head = {
        f"{HEAD}.weight": torch.randn(WIDTH, 32, generator=generator) / 32**0.5,
        f"{HEAD}.bias": torch.randn(WIDTH, generator=generator) * 0.5,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = save(make_model(name), folder, extra=head)
    change(source, **{"multi_vector_projector_dim": WIDTH, **config})
    return source


def change(source: Path, **changes: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value != "gone"}
    write_json(source / "config.json", config)


def make_adapter(source: Path, folder: Path) -> Path:
    config = LoraConfig(r=3, lora_alpha=8, target_modules=ADAPTED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(WithHead(source), config)
        generator = torch.Generator().manual_seed(9)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = noise * (0.7 / parameter.shape[-1] ** 0.5)
        model.save_pretrained(folder)
    return folder


def reference(source: Path, adapter: Path | None) -> tuple[NDArray[np.float32], list[Any]]:
    """Vectors of each text alone, and of each of its tokens."""
    model: Any = WithHead(source)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    single, multi = [], []
    for text in TEXTS:
        with torch.no_grad():
            states, rows = model(torch.tensor([tokenizer.encode(text).ids]))
        mean = states[0].mean(0)
        single.append((mean / mean.norm()).numpy())
        multi.append((rows[0] / rows[0].norm(dim=-1, keepdim=True)).numpy())
    return np.stack(single), multi


def export(source: Path, adapter: Path | None, out: Path, precision: str = "fp32") -> Embedder:
    export_bundle(source, adapters={"task": adapter}, precisions=[precision], out=out)
    return Embedder(out, precision=precision, threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [True, False], ids=["adapter", "bare"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_both_outputs_match_transformers_with_peft(
    name: str, adapted: bool, tmp_path: Path
) -> None:
    source = make_source(name, tmp_path / "source")
    adapter = make_adapter(source, tmp_path / "adapter") if adapted else None
    model = export(source, adapter, tmp_path / "out")
    single, multi = reference(source, adapter)

    assert cosines(model.encode(TEXTS), single).min() >= BOUND
    rows = model.encode(TEXTS, multi_vector=True)
    assert [row.shape for row in rows] == [row.shape for row in multi]
    assert cosines(np.concatenate(rows), np.concatenate(multi)).min() >= BOUND
    assert np.abs(np.linalg.norm(np.concatenate(rows), axis=1) - 1).max() < 1e-5


@pytest.mark.slow
def test_padding_has_vectors_of_length_0(tmp_path: Path) -> None:
    source = make_source("llama", tmp_path / "source")
    export(source, make_adapter(source, tmp_path / "adapter"), tmp_path / "out")
    session = open_graph(tmp_path / "out/fp32/task.onnx")
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3], dtype=np.int64)
    ids = np.random.default_rng(0).integers(4, 96, mask.shape) * mask

    [rows] = session.run(["token_embeddings"], {"input_ids": ids, "attention_mask": mask})

    assert rows.shape == (2, 7, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=2), mask, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.98), ("int4", 0.8)])
def test_quantized_graphs_have_the_head_too(precision: str, bound: float, tmp_path: Path) -> None:
    source = make_source("llama", tmp_path / "source")
    model = export(source, None, tmp_path / "out", precision)
    _, multi = reference(source, None)

    rows = model.encode(TEXTS, multi_vector=True)

    assert [row.shape for row in rows] == [row.shape for row in multi]
    assert cosines(np.concatenate(rows), np.concatenate(multi)).mean() > bound


def test_a_head_that_the_config_does_not_name_is_refused(tmp_path: Path) -> None:
    source = make_source("llama", tmp_path / "source", multi_vector_projector_dim="gone")
    with pytest.raises(CheckpointError, match=f"found {HEAD}"):
        export(source, None, tmp_path / "out")


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    source = make_source("llama", tmp_path / "source")
    change(source, multi_vector_projector_dim=WIDTH + 1)
    with pytest.raises(CheckpointError, match=rf"{HEAD}\.weight: expected shape \[13, 32\]"):
        export(source, None, tmp_path / "out")


def test_a_head_without_weights_is_refused(tmp_path: Path) -> None:
    source = save(make_model("llama"), tmp_path / "source")
    change(source, multi_vector_projector_dim=WIDTH)
    with pytest.raises(CheckpointError, match=HEAD):
        export(source, None, tmp_path / "out")


def test_matryoshka_dimensions_come_from_the_config(tmp_path: Path) -> None:
    source = make_source("llama", tmp_path / "source", matryoshka_dims=[8, 16, 32])
    model = export(source, None, tmp_path / "out")
    assert model.encode(TEXTS[:2], truncate_dim=16).shape == (2, 16)
    with pytest.raises(ValueError, match="8, 16, 32"):
        model.encode(TEXTS[:2], truncate_dim=20)


def test_matryoshka_dimensions_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    source = make_source("llama", tmp_path / "source", matryoshka_dims="64")
    with pytest.raises(CheckpointError, match="matryoshka_dims is '64'"):
        export(source, None, tmp_path / "out")
