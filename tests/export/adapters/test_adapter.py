"""Merged tensors equal PEFT's own merge; whatever cannot be merged exactly is refused by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from embedge.export.adapters.adapter import Adapter, BoundAdapter
from embedge.export.errors import AdapterError
from embedge.export.source.checkpoint import Checkpoint

# float32 rounding of a sum of a few products around 1, in another order than torch's.
BOUND = 1e-6
WRAPPERS = ("base_model.model.", "0.auto_model.", "bert.", "model.", "transformer.")


def canonical(key: str) -> str:
    """Strip wrapper prefixes, as a model family does."""
    for _ in WRAPPERS:
        for prefix in WRAPPERS:
            key = key.removeprefix(prefix)
    return key


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=32,
    )
    return BertModel(config)


def llama() -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=32,
    )
    return LlamaModel(config)


def gpt2() -> GPT2Model:
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50, n_positions=32))


class Wrapper(torch.nn.Module):
    """A model with the encoder as ``bert``, like transformers' models with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = bert()
        self.config = self.bert.config


MODELS: dict[str, Callable[[], Any]] = {
    "bert": bert,
    "llama": llama,
    "gpt2": gpt2,
    "wrapped bert": Wrapper,
}


def randomize(model: PeftModel) -> None:
    """Give every trainable tensor random, non-zero values, as training does."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            kept = (
                parameter.data
                if "magnitude" in name or "bias" in name or "weight_norm" in name
                else 0
            )
            parameter.data = kept + noise


def save_base(model: torch.nn.Module, folder: Path) -> Path:
    base: Any = model.bert if isinstance(model, Wrapper) else model
    base.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, model: str = "bert", **config: Any) -> dict[str, torch.Tensor]:
    """Save base and adapter below ``folder``; return the state of PEFT's own merge."""
    base = MODELS[model]()
    save_base(base, folder / "base")
    base.name_or_path = str(folder / "base")  # PEFT records it
    config = {"r": 3, "lora_alpha": 7, "target_modules": ["query", "dense"], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT talks about fan_in_fan_out, lora_bias, embeddings, …
        adapted = get_peft_model(base, LoraConfig(**config))
        randomize(adapted)
        adapted.save_pretrained(folder / "adapter")
        merged: dict[str, torch.Tensor] = adapted.merge_and_unload().state_dict()
    return merged


def bind(folder: Path) -> BoundAdapter:
    return Adapter.load(folder / "adapter", "code").bind(Checkpoint(folder / "base"), canonical)


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


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


def test_keys_with_the_adapters_name_in_them_are_read(tmp_path: Path) -> None:
    """A raw state_dict, as older tools save it, has ``lora_A.default.weight``."""
    merged = save_adapter(
        tmp_path, use_dora=True, modules_to_save=["pooler"], target_modules=["query"]
    )

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            new = key.replace(".lora_A.", ".lora_A.default.").replace(
                ".lora_B.", ".lora_B.default."
            )
            new = new.replace("magnitude_vector", "magnitude_vector.default.weight")
            new = new.replace("pooler.dense", "pooler.modules_to_save.default.dense")
            tensors[new] = tensors.pop(key)

    edit_weights(tmp_path, rename)

    bound = bind(tmp_path)

    assert "pooler.dense.weight" in bound.touched
    assert all(np.abs(bound.read(key) - merged[key].numpy()).max() <= BOUND for key in bound.keys())


def test_square_weights_of_a_linear_are_not_transposed_by_a_wrong_flag(tmp_path: Path) -> None:
    """PEFT turns fan_in_fan_out off on nn.Linear, with a warning; the shapes could not tell."""
    merged = save_adapter(tmp_path, target_modules=["query"])
    edit_config(tmp_path, fan_in_fan_out=True)

    bound = bind(tmp_path)

    assert all(np.abs(bound.read(key) - merged[key].numpy()).max() <= BOUND for key in bound.keys())


QUERY = "base_model.model.encoder.layer.0.attention.self.query"
MISFITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a key of no tensor": (
        lambda t: t.update({"base_model.model.pooler.missing.weight": torch.ones(2)}),
        "base_model.model.pooler.missing.weight: finds no tensor of the model",
    ),
    "LoRA on no tensor": (
        lambda t: t.update(
            {f"{QUERY}x.lora_{f}.weight": t[f"{QUERY}.lora_{f}.weight"].clone() for f in "AB"}
        ),
        f"{QUERY}x.lora_A.weight: finds no tensor of the model",
    ),
    "A without B": (
        lambda t: t.pop(f"{QUERY}.lora_B.weight"),
        "encoder.layer.0.attention.self.query: has lora_A but no lora_B",
    ),
    "a shape": (
        lambda t: t.update({f"{QUERY}.lora_B.weight": torch.ones(40, 3)}),
        f"{QUERY}.lora_A.weight, {QUERY}.lora_B.weight: their product of shape [40, 24] does not "
        "fit encoder.layer.0.attention.self.query.weight of shape [24, 24]",
    ),
    "the shape of a full tensor": (
        lambda t: t.update({"base_model.model.pooler.dense.weight": torch.ones(24, 25)}),
        "base_model.model.pooler.dense.weight: shape [24, 25] does not "
        "fit pooler.dense.weight of shape [24, 24]",
    ),
    "a rank unlike the config": (
        lambda t: t.update(
            {
                f"{QUERY}.lora_A.weight": torch.ones(2, 24),
                f"{QUERY}.lora_B.weight": torch.ones(24, 2),
            }
        ),
        "encoder.layer.0.attention.self.query: rank 2 in the weights, 3 by adapter_config.json; set r "
        "and rank_pattern in adapter_config.json as they were in training",
    ),
    "a kind of key that PEFT's LoRA does not have": (
        lambda t: t.update({f"{QUERY}.lora_diag": torch.ones(3)}),
        f"{QUERY}.lora_diag: not a key that PEFT's LoRA has",
    ),
    "a magnitude without DoRA": (
        lambda t: t.update({f"{QUERY}.lora_magnitude_vector": torch.ones(24)}),
        f"{QUERY}.lora_magnitude_vector: not used, adapter_config.json does not set use_dora",
    ),
    "a LoRA bias without lora_bias": (
        lambda t: t.update({f"{QUERY}.lora_B.bias": torch.ones(24)}),
        f"{QUERY}.lora_B.bias: not used, adapter_config.json does not set lora_bias",
    ),
    "a bias where PEFT reads the base layer's": (
        lambda t: t.update({f"{QUERY}.bias": torch.ones(24)}),
        f"{QUERY}.bias: this module has LoRA, where PEFT reads only {QUERY}.base_layer.bias",
    ),
    "a base layer's tensor without LoRA": (
        lambda t: t.update({"base_model.model.pooler.dense.base_layer.bias": torch.ones(24)}),
        "base_model.model.pooler.dense.base_layer.bias: a base layer's tensor, but the file has "
        "no LoRA for pooler.dense",
    ),
    "two adapters in one file": (
        lambda t: t.update({f"{QUERY}.lora_A.other.weight": torch.ones(3, 24)}),
        f"{QUERY}.lora_A.weight: a second lora_A beside "
        f"{QUERY}.lora_A.other.weight; is it another adapter's?",
    ),
    "two values for one tensor": (
        lambda t: t.update(
            {
                f"base_model.model.{m}.dense.bias": torch.full((24,), float(i))
                for i, m in enumerate(["pooler", "pooler.modules_to_save"])
            }
        ),
        "base_model.model.pooler.modules_to_save.dense.bias: another value for pooler.dense.bias "
        "than base_model.model.pooler.dense.bias",
    ),
    "the same module under two names": (
        lambda t: t.update(
            {
                f"base_model.model.bert.{QUERY[17:]}.lora_{f}.weight": t[
                    f"{QUERY}.lora_{f}.weight"
                ].clone()
                for f in "AB"
            }
        ),
        f"{QUERY}.lora_A.weight: a second LoRA for encoder.layer.0.attention.self.query.weight "
        f"beside base_model.model.bert.{QUERY[17:]}.lora_A.weight",
    ),
    "LoRA on a convolution": (
        lambda t: t.update(
            {
                f"{QUERY}.lora_A.weight": torch.ones(3, 24, 1),
                f"{QUERY}.lora_B.weight": torch.ones(24, 3, 1),
            }
        ),
        f"{QUERY}.lora_A.weight: shape [3, 24, 1], expected [rank, "
        "in]; LoRA on convolutions is not supported",
    ),
    "NaN": (
        lambda t: t[f"{QUERY}.lora_B.weight"].__setitem__((4, 1), float("nan")),
        f"tensor '{QUERY}.lora_B.weight' holds nan at [4, 1], expected finite numbers",
    ),
    "infinity": (
        lambda t: t[f"{QUERY}.lora_A.weight"].__setitem__((0, 0), float("inf")),
        f"tensor '{QUERY}.lora_A.weight' holds inf at [0, 0], expected finite numbers",
    ),
    "a copy of the base without the trained tensor": (
        lambda t: t.update({"base_model.model.pooler.original_module.dense.bias": torch.ones(24)}),
        "base_model.model.pooler.original_module.dense.bias: a copy of "
        "the base's tensor without the trained one",
    ),
    "integers": (
        lambda t: t.update(
            {"base_model.model.pooler.dense.bias": torch.ones(24, dtype=torch.int64)}
        ),
        "tensor 'base_model.model.pooler.dense.bias' is I64, expected F16, BF16, F32 or F64",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_whatever_does_not_fit_is_an_error_that_names_it(misfit: str, tmp_path: Path) -> None:
    change, expected = MISFITS[misfit]
    save_adapter(tmp_path, target_modules=["query"])
    edit_weights(tmp_path, change)

    with pytest.raises(AdapterError) as caught:
        bind(tmp_path)

    assert expected in str(caught.value)
    assert "1 problem:" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": ["query"]},
        {"target_modules": r".*\.query"},
        {"exclude_modules": ["dense"]},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_tensors_that_peft_leaves_out_are_refused_by_name(
    change: dict[str, Any], tmp_path: Path
) -> None:
    save_adapter(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(AdapterError, match="PEFT leaves it out.*set target_modules in"):
        bind(tmp_path)


def test_all_misfits_stand_in_one_message(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"])

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(f"{QUERY}.lora_A.weight")
        tensors["classifier.weight"] = torch.ones(2, 24)

    edit_weights(tmp_path, spoil)

    with pytest.raises(AdapterError) as caught:
        bind(tmp_path)

    assert str(caught.value) == (
        f"adapter 'code' ({tmp_path / 'adapter'}) does not fit the model 'base', 2 problems: "
        "classifier.weight: finds no tensor of the model; encoder.layer.0.attention.self.query: "
        "has lora_B but no lora_A; use it with the model that it was trained on, as PEFT saved it"
    )


def test_an_adapter_of_another_model_is_one_problem_that_names_both(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"])

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("encoder.layer", "layers")] = tensors.pop(key)

    edit_weights(tmp_path, rename)
    edit_config(tmp_path, base_model_name_or_path="someone/decoder")

    with pytest.raises(AdapterError) as caught:
        bind(tmp_path)

    assert str(caught.value) == (
        f"adapter 'code' ({tmp_path / 'adapter'}) does not fit the model 'base', 1 problem: none of "
        "its 2 modules is in this bert: it was trained on 'decoder' and has "
        "layers.0.attention.self.query.weight, the model has "
        "encoder.layer.0.attention.output.dense.weight; use it with the model that it was trained on, "
        "as PEFT saved it"
    )


def test_a_model_whose_tensors_it_finds_is_not_another_one(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"])
    edit_config(tmp_path, r=2)
    edit_weights(tmp_path, lambda t: t.update({"classifier.weight": torch.ones(2)}))

    with pytest.raises(
        AdapterError, match=r"3 problems: classifier\.weight: finds no tensor of the"
    ):
        bind(tmp_path)


def test_of_many_problems_the_first_are_listed_and_all_counted(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"])
    edit_weights(
        tmp_path, lambda t: t.update({f"classifier.{i}.weight": torch.ones(2) for i in range(9)})
    )

    with pytest.raises(AdapterError) as caught:
        bind(tmp_path)

    assert "9 problems: classifier.0.weight: finds no tensor" in str(caught.value)
    assert "classifier.3.weight: finds no tensor of the model; and 5 more; use it" in str(
        caught.value
    )


def test_a_missing_magnitude_is_an_error(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"])
    edit_config(tmp_path, use_dora=True)

    with pytest.raises(
        AdapterError,
        match=r"0\.attention\.self\.query: has lora_A, lora_B but no lora_magnitude_vector",
    ):
        bind(tmp_path)


def test_a_missing_tensor_of_modules_to_save_is_an_error(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"], modules_to_save=["pooler"])
    edit_weights(tmp_path, lambda t: t.pop("base_model.model.pooler.dense.bias"))

    with pytest.raises(
        AdapterError,
        match=r"pooler\.dense\.bias: belongs to modules_to_save 'pooler', but the adapter",
    ):
        bind(tmp_path)


def test_a_name_that_finds_several_tensors_is_an_error(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["query"])
    adapter, checkpoint = (
        Adapter.load(tmp_path / "adapter", "code"),
        Checkpoint(tmp_path / "base"),
    )

    def too_short(key: str) -> str:
        return ".".join(key.split(".")[-2:])

    with pytest.raises(
        AdapterError,
        match=r"finds several tensors of the model: encoder\.layer\.0\S+, encoder\.layer\.1",
    ):
        adapter.bind(checkpoint, too_short)


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
