"""Tensors that config.json does not imply, that are missing, or of another shape, are refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedge.export import CheckpointError, export_bundle
from tests.helpers.config_changes import KINDS, change
from tests.helpers.models import make_model, save, write_json


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "layers.0.self_attn.q_proj.bias"),
        ("llama", "layers.1.mlp.up_proj.bias"),
        ("llama", "layers.0.self_attn.q_norm.weight"),
        ("qwen2", "layers.0.self_attn.o_proj.bias"),
        ("qwen3", "layers.0.self_attn.k_proj.bias"),
        ("mistral", "layers.0.mlp.down_proj.bias"),
        ("modernbert", "layers.1.attn.Wqkv.bias"),
        ("modernbert", "layers.1.mlp.Wo.bias"),
    ],
)
def test_tensors_that_transformers_would_leave_out_are_refused_by_name(
    kind: str, name: str, tmp_path: Path
) -> None:
    model = make_model(kind, **KINDS[kind].settings)
    source = save(model, tmp_path / "source", extra={name: torch.ones(32)})
    with pytest.raises(CheckpointError, match=name):
        export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("bert", {}, "encoder.layer.1.attention.self.query.bias"),
        ("distilbert", {}, "transformer.layer.0.ffn.lin1.bias"),
        ("mpnet", {}, "encoder.layer.0.attention.attn.o.bias"),
        pytest.param(
            *("modernbert-with-biases", {}, "layers.1.attn.Wqkv.bias"), marks=pytest.mark.slow
        ),
        ("llama", {"attention_bias": True}, "layers.0.self_attn.q_proj.bias"),
        ("llama", {"mlp_bias": True}, "layers.0.mlp.gate_proj.bias"),
        ("qwen2", {}, "layers.1.self_attn.k_proj.bias"),
        ("qwen3", {"attention_bias": True}, "layers.0.self_attn.q_proj.bias"),
        ("gemma3_text", {"attention_bias": True}, "layers.0.self_attn.q_proj.bias"),
    ],
    ids=str,
)
def test_a_missing_bias_is_refused_by_name(
    kind: str, settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    source = save(make_model(kind), tmp_path / "source")
    file = source / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if not k.endswith(name)}
    save_file(tensors, file, metadata={"format": "pt"})
    change(source, **settings)
    said = ".*".join([re.escape(name), "expected this tensor", *settings])
    with pytest.raises(CheckpointError, match=said):
        export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["bert", "mpnet", "modernbert-with-biases", "llama-with-biases", "qwen2", "qwen3"]
)
def test_a_tensor_of_another_shape_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    source = save(make_model(kind), tmp_path / "source")
    file = source / "model.safetensors"
    tensors = load_file(file)
    changed = [key for key in sorted(tensors) if ".1." not in key and "position_ids" not in key]
    for key in changed:
        value = tensors[key]
        others = [value[:-1]] if value.ndim == 1 else [value[:, :-1], value[:-1], value.T]
        for other in others:
            table = key.endswith(("word_embeddings.weight", "tok_embeddings.weight"))
            is_table = table or key.endswith("embed_tokens.weight")
            if other.shape == value.shape or (is_table and other.shape[1] == value.shape[1]):
                continue
            save_file({**tensors, key: other.contiguous()}, file, metadata={"format": "pt"})
            with pytest.raises(CheckpointError, match="expected shape .* found") as caught:
                export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "o")
            module = key.removeprefix("model.").rpartition(".")[0]
            assert module in str(caught.value) or "mlp" in key or "dense" in key
            assert not (tmp_path / "o").exists()


def test_a_dense_layer_that_does_not_follow_the_vector_is_refused(tmp_path: Path) -> None:
    source = save(make_model("bert"), tmp_path / "source", dense=((24, "Tanh"),))
    settings = json.loads((source / "2_Dense/config.json").read_text())
    write_json(source / "2_Dense/config.json", {**settings, "in_features": 16})
    weights = load_file(source / "2_Dense/model.safetensors")
    weights["linear.weight"] = weights["linear.weight"][:, :16].contiguous()
    save_file(weights, source / "2_Dense/model.safetensors")
    with pytest.raises(CheckpointError, match="Dense layer 1 has in_features 16, expected 32"):
        export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "o")
