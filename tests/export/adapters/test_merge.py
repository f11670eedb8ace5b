"""Merged tensors equal PEFT's own merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertModel

from embedge.export.errors import AdapterError
from tests.helpers.peft_models import (
    BOUND,
    QUERY,
    bind,
    canonical,
    edit_config,
    edit_weights,
    save_adapter,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all linear": {"target_modules": "all-linear"},
    "rank and alpha patterns": {
        "rank_pattern": {"query": 2, r"layer\.1\.output\.dense": 5},
        "alpha_pattern": {r"layer\.0\..*\.dense": 11, "^encoder.layer.1.attention.self.query": 2},
    },
    "patterns that overlap": {
        "rank_pattern": {"dense": 2, "output.dense": 4},
        "alpha_pattern": {"y": 9, "query": 3},
    },
    "rsLoRA": {"use_rslora": True},
    "rsLoRA with patterns": {
        "use_rslora": True,
        "rank_pattern": {"query": 2},
        "alpha_pattern": {"query": 5},
    },
    "DoRA": {"use_dora": True},
    "DoRA with rsLoRA and patterns": {
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"query": 6},
    },
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "bias all with DoRA": {"bias": "all", "use_dora": True},
    "lora_bias": {"lora_bias": True},
    "lora_bias with bias lora_only": {"lora_bias": True, "bias": "lora_only", "use_rslora": True},
    "modules_to_save": {"modules_to_save": ["pooler", "LayerNorm"], "target_modules": ["query"]},
    "modules_to_save with bias all": {"modules_to_save": ["key"], "bias": "all"},
    "embedding": {"target_modules": ["word_embeddings", "query"]},
    "embedding with DoRA": {"target_modules": ["word_embeddings", "query"], "use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "MiCA": {"init_lora_weights": "mica"},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layer"},
    "VeLoRA": {"velora_config": {"num_groups": 2}, "target_modules": ["query"]},
    "Llama": {"model": "llama", "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "Llama with DoRA": {"model": "llama", "target_modules": "all-linear", "use_dora": True},
    "Llama with its embedding, saved with the base's": {
        "model": "llama",
        "target_modules": ["embed_tokens", "q_proj"],
    },
    "Llama with the embedding trained": {
        "model": "llama",
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "norm"],
    },
    "GPT-2, fan_in_fan_out": {
        "model": "gpt2",
        "target_modules": ["c_attn", "c_proj", "wte"],
        "fan_in_fan_out": True,
    },
    "GPT-2 with DoRA and bias": {
        "model": "gpt2",
        "target_modules": ["c_attn", "c_fc", "c_proj"],
        "fan_in_fan_out": True,
        "use_dora": True,
        "bias": "all",
    },
    "trained inside a wrapper": {"model": "wrapped bert"},
    "trained inside a wrapper, anchored patterns": {
        "model": "wrapped bert",
        "rank_pattern": {"^bert.encoder.layer.0.output.dense": 2},
        "alpha_pattern": {"^encoder.layer.0.output.dense": 99},
        "modules_to_save": ["pooler"],
        "target_modules": ["query", "output.dense"],
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_tensors_equal_pefts_own_merge(variant: str, tmp_path: Path) -> None:
    merged = save_adapter(tmp_path, **VARIANTS[variant])

    bound = bind(tmp_path)

    expected = {
        canonical(key): value.numpy() for key, value in merged.items() if value.is_floating_point()
    }
    keys = [key for key in bound.keys() if bound.checkpoint.is_float(key)]
    assert {canonical(key) for key in keys} == set(expected)
    differences = {
        key: float(np.abs(bound.read(key) - expected[canonical(key)]).max()) for key in keys
    }
    assert max(differences.values()) <= BOUND, differences
    changed = {
        k for k in keys if not np.array_equal(expected[canonical(k)], bound.checkpoint.read(k))
    }
    assert bound.touched == changed
    assert changed, "the variant should change something"


def test_untouched_tensors_are_the_bases_bit_for_bit(tmp_path: Path) -> None:
    save_adapter(tmp_path)

    bound = bind(tmp_path)

    untouched = [key for key in bound.keys() if key not in bound.touched]
    assert "embeddings.word_embeddings.weight" in untouched
    assert all(np.array_equal(bound.read(key), bound.checkpoint.read(key)) for key in untouched)


def test_a_merge_by_hand(tmp_path: Path) -> None:
    """W + alpha/r · B·A, written out, without PEFT's help."""
    save_adapter(tmp_path, r=3, lora_alpha=7)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    module = "encoder.layer.1.output.dense"  # 40 → 24
    a, b = (
        tensors[f"base_model.model.{module}.lora_{factor}.weight"].double().numpy()
        for factor in "AB"
    )
    bound = bind(tmp_path)

    base = bound.checkpoint.read(f"{module}.weight")

    assert np.abs(bound.read(f"{module}.weight") - (base + 7 / 3 * b @ a)).max() <= BOUND


def test_a_bfloat16_adapter_is_merged_in_float32(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({key: value.bfloat16() for key, value in t.items()}))
    base = BertModel.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()

    bound = bind(tmp_path)

    for key in bound.touched:
        assert np.abs(bound.read(key) - merged[key].numpy()).max() <= BOUND, key


def test_lora_bias_adds_the_bias_that_the_base_lacks(tmp_path: Path) -> None:
    """PEFT refuses this merge; unmerged it adds scaling · bias to the layer's output."""
    save_adapter(tmp_path, model="llama", target_modules=["q_proj"])
    edit_config(tmp_path, lora_bias=True)
    bias = torch.arange(24.0)
    name = "base_model.model.layers.{}.self_attn.q_proj.lora_B.bias"
    edit_weights(tmp_path, lambda t: t.update({name.format(i): bias + i for i in range(2)}))

    bound = bind(tmp_path)

    key = "layers.1.self_attn.q_proj.bias"
    assert bound.added == {"layers.0.self_attn.q_proj.bias", key}
    assert bound.added <= bound.touched
    assert bound.has(key) and not bound.checkpoint.has(key)
    assert bound.shape(key) == (24,)
    assert np.abs(bound.read(key) - 7 / 3 * (bias.numpy() + 1)).max() <= 1e-5  # 5 ulp of 56


def test_square_weights_of_a_linear_are_not_transposed_by_a_wrong_flag(tmp_path: Path) -> None:
    """PEFT turns fan_in_fan_out off on nn.Linear, with a warning; the shapes could not tell."""
    merged = save_adapter(tmp_path, target_modules=["query"])
    edit_config(tmp_path, fan_in_fan_out=True)

    bound = bind(tmp_path)

    assert all(np.abs(bound.read(key) - merged[key].numpy()).max() <= BOUND for key in bound.keys())


def test_dora_on_an_output_without_direction_names_the_tensor(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"], use_dora=True)
    key = "encoder.layer.0.attention.self.query.weight"
    base = tmp_path / "base" / "model.safetensors"
    tensors = load_file(base)
    tensors[key][5] = 0
    save_file(tensors, base)
    edit_weights(tmp_path, lambda t: t[f"{QUERY}.lora_B.weight"].__setitem__(5, 0.0))

    with pytest.raises(
        AdapterError,
        match=r"'encoder\S+query\.weight' cannot be merged by DoRA: output 5 has the norm 0",
    ):
        bind(tmp_path).read(key)


def test_an_overflowing_merge_names_the_tensor(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"])
    edit_weights(
        tmp_path,
        lambda t: t.update({key: torch.full_like(value, 1e30) for key, value in t.items()}),
    )

    with pytest.raises(
        AdapterError, match=r"'encoder\.layer\.0\.attention\.self\.query\.weight' becomes inf"
    ):
        bind(tmp_path).read("encoder.layer.0.attention.self.query.weight")


def test_blocks_of_rows_give_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from embedge.export.adapters import merge

    generator = np.random.default_rng(0)
    weight, a, b = (
        generator.normal(size=shape).astype(np.float32) for shape in [(7, 5), (2, 5), (7, 2)]
    )
    for transposed in (False, True):
        for block_values in (1, 12, 1 << 20):
            monkeypatch.setattr(merge, "_BLOCK_VALUES", block_values)
            merged = (weight.T if transposed else weight).copy()
            merge.add_low_rank(merged, a, b, 0.5, transposed=transposed)
            expected = weight + 0.5 * b @ a
            assert np.abs(merged - (expected.T if transposed else expected)).max() <= BOUND
