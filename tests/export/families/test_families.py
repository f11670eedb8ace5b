"""fp32 graphs give the vectors of transformers' models with PEFT's adapter, unmerged."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors

from embedge.export import CheckpointError, export_bundle
from embedge.runtime import Embedder, EmbedgeValueError, EmbedgeWarning
from tests.helpers.models import (
    CONFIGS,
    DECODERS,
    LLAMA3_ROPE,
    Reference,
    cosines,
    linears,
    make_model,
    make_tokenizer,
    random_texts,
    save,
    save_adapter,
    write_json,
)

BOUND = 0.999999
TEXTS = random_texts()
ONE_OF_EACH_KIND = ("bert", "qwen2")


def usual_pooling(name: str) -> str:
    return "lasttoken" if name in DECODERS else "mean"


def exported(source: Path, adapter: Path | None, out: Path, **options: Any) -> Embedder:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_bundle(source, adapters={"task": adapter}, precisions=["fp32"], out=out, **options)
    return Embedder(out, precision="fp32", threads=1)


def assert_parity(source: Path, adapter: Path | None, out: Path) -> None:
    ours = exported(source, adapter, out).encode(TEXTS)
    theirs = Reference(source, adapter).encode(TEXTS)
    assert ours.shape == theirs.shape
    assert cosines(ours, theirs).min() >= BOUND
    assert np.abs(np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1) - 1).max() < 1e-4


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {
        name: save(make_model(name), root / name, pooling=usual_pooling(name)) for name in CONFIGS
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_random_lora_on_all_linears_matches_peft(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_adapter(sources[name], tmp_path / "adapter", target=linears(name))
    assert_parity(sources[name], adapter, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_the_bare_backbone_matches_transformers(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    assert_parity(sources[name], None, tmp_path / "out")


SAVED = {
    ("bert", "a norm"): ["attention.output.LayerNorm"],
    ("bert", "a Linear"): ["encoder.layer.1.output.dense"],
    ("qwen2", "a norm"): ["input_layernorm", "norm"],
    ("qwen2", "a Linear"): ["layers.1.mlp.down_proj"],
}
TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "qwen2": ["q_proj", "v_proj", "up_proj"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "what"), SAVED)
def test_modules_to_save_take_the_place_of_the_base_modules(
    name: str, what: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_adapter(
        sources[name],
        tmp_path / "adapter",
        target=TARGETS[name],
        modules_to_save=SAVED[name, what],
    )
    assert_parity(sources[name], adapter, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_dora_matches_peft(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(sources[name], tmp_path / "adapter", target=linears(name), use_dora=True)
    assert_parity(sources[name], adapter, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_rank_and_alpha_patterns_match_peft(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    first, second, third = TARGETS[name]
    adapter = save_adapter(
        sources[name],
        tmp_path / "adapter",
        target=TARGETS[name],
        rank_pattern={first: 5, f"1.*{third}": 2},
        alpha_pattern={second: 11},
        use_rslora=True,
    )
    assert_parity(sources[name], adapter, tmp_path / "out")


@pytest.mark.slow
def test_an_adapted_word_embedding_matches_peft(sources: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(
        sources["bert"], tmp_path / "adapter", target=["word_embeddings", "query"]
    )
    assert_parity(sources["bert"], adapter, tmp_path / "out")


@pytest.mark.slow
def test_trained_biases_match_peft(sources: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(
        sources["bert"], tmp_path / "adapter", target=linears("bert"), bias="all"
    )
    assert_parity(sources["bert"], adapter, tmp_path / "out")


@pytest.mark.slow
def test_a_bias_that_only_lora_has_matches_peft(sources: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(
        sources["llama"], tmp_path / "adapter", target=["o_proj"], lora_bias=True
    )
    assert_parity(sources["llama"], adapter, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("name", ["bert", "mistral"])
def test_every_pooling_is_the_one_by_hand(name: str, pooling: str, tmp_path: Path) -> None:
    source = save(make_model(name), tmp_path / "source", pooling=pooling)
    assert_parity(source, None, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("activation", ["Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU"])
def test_dense_layers_follow_pooling(activation: str, normalize: bool, tmp_path: Path) -> None:
    model = make_model("bert", num_hidden_layers=1)
    layers = [(24, activation), (20, "Identity")]
    source = save(model, tmp_path / "source", dense=layers, normalize=normalize)
    assert_parity(source, None, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu"])
def test_every_activation_is_that_of_transformers(activation: str, tmp_path: Path) -> None:
    model = make_model("bert", num_hidden_layers=1, hidden_act=activation)
    assert_parity(save(model, tmp_path / "source"), None, tmp_path / "out")


@pytest.mark.slow
def test_token_types_of_the_tokenizer_reach_the_model(tmp_path: Path) -> None:
    source = save(make_model("bert"), tmp_path / "source")
    tokenizer = make_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:1 </s>:1", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    tokenizer.save(str(source / "tokenizer.json"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    names = ["input_ids", "token_type_ids", "attention_mask"]
    write_json(source / "tokenizer_config.json", {**settings, "model_input_names": names})
    reference = Reference(source).model
    theirs = []
    for text in TEXTS:
        encoding = tokenizer.encode(text)
        with torch.no_grad():
            states = reference(
                input_ids=torch.tensor([encoding.ids]),
                token_type_ids=torch.tensor([encoding.type_ids]),
            )[0]
        theirs.append(states[0].mean(0).numpy())
    ours = exported(source, None, tmp_path / "out").encode(TEXTS)
    assert cosines(ours, np.stack(theirs)).min() >= BOUND


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pad"), [(n, p) for n in ("roberta", "mpnet") for p in (0, 1)])
def test_positions_count_from_where_transformers_counts(
    name: str, pad: int, tmp_path: Path
) -> None:
    source = save(make_model(name, pad_token_id=pad), tmp_path / "source")
    assert_parity(source, None, tmp_path / "out")


@pytest.mark.slow
def test_a_text_beyond_the_limit_is_cut_like_the_reference(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    text = " ".join(random_texts(12))
    model = exported(sources["bert"], None, tmp_path / "out")
    ours = model.encode([text], on_truncate="ignore")
    assert cosines(ours, Reference(sources["bert"]).encode([text])).min() >= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_decoder_with_a_language_head_is_read_without_it(prefix: str, tmp_path: Path) -> None:
    extra = {"lm_head.weight": torch.randn(96, 32)} if prefix else {}
    source = save(make_model("llama"), tmp_path / "source", pooling="mean", extra=extra)
    assert_parity(source, None, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert", {"num_attention_heads": 5}, "num_attention_heads and hidden_size"),
        ("bert", {"hidden_size": 16}, "embeddings.weight: expected shape"),
        ("modernbert", {"intermediate_size": 48}, r"mlp\.Wi\.weight: expected shape"),
        ("qwen2", {"num_key_value_heads": 3}, "num_key_value_heads and num_attention_heads"),
        ("qwen2", {"num_key_value_heads": 4}, r"k_proj\.weight: expected shape \[32, 32\]"),
        ("qwen3", {"head_dim": 8}, r"k_proj\.weight: expected shape"),
        ("bert", {"type_vocab_size": None}, "type_vocab_size: expected an integer of at least 0"),
        ("roberta", {"pad_token_id": "<pad>"}, "pad_token_id: expected an integer of at least 0"),
        ("llama", {"rope_theta": None}, "rope_theta: expected a number, found None"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor: expected a"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "_freq_factor: expec"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_a_config_that_does_not_fit_the_weights_or_its_types_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = save(make_model(name), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config.pop("rope_parameters", None)  # where transformers 5 has saved it
    write_json(source / "config.json", {**config, **changes})
    with pytest.raises(CheckpointError, match=message):
        export_bundle(source, adapters={"task": None}, precisions=["fp32"], out=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["roberta", "xlm-roberta", "mpnet"])
def test_a_padding_token_in_a_text_has_a_position_as_any_other(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    ids = np.array([2, 7, 1, 9, 1, 1, 12, 3])  # 1 is <pad>
    model = Reference(sources[name]).model
    with torch.no_grad():
        tokens = torch.tensor(ids)[None]
        positions = torch.arange(2, 2 + len(ids))[None]
        mask = torch.ones_like(tokens)
        states = model(input_ids=tokens, attention_mask=mask, position_ids=positions)[0][0]
    expected = states.mean(0) / states.mean(0).norm()
    found = exported(sources[name], None, tmp_path / "out").run_ids([ids])
    assert cosines(found, expected.numpy()[None]).min() >= 0.999999


@pytest.mark.parametrize(
    "rope",
    [
        {"factor": 4.0, "original_max_position_embeddings": 16},
        {"factor": 2.0},
        {"factor": 8.0, "attention_factor": 0.7, "beta_fast": 4.0, "beta_slow": 0.5},
        {"factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
        {"factor": 8.0, "mscale": 0.7, "original_max_position_embeddings": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_yarn_matches_transformers(name: str, rope: dict[str, Any], tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", **rope}
    model = make_model(name, head_dim=32, rope_theta=100.0, rope_scaling=scaling)
    source = save(model, tmp_path / "source", pooling="mean")
    found = exported(source, None, tmp_path / "out").encode(TEXTS)
    assert cosines(found, Reference(source).encode(TEXTS)).min() >= 0.999999


@pytest.mark.slow
def test_rope_parameters_of_transformers_5_mean_the_same(tmp_path: Path) -> None:
    source = save(make_model("llama", rope_theta=500.0), tmp_path / "source", pooling="mean")
    config = json.loads((source / "config.json").read_text())
    before = exported(source, None, tmp_path / "before").encode(TEXTS)
    written = {key: config.pop(key, None) for key in ("rope_scaling", "rope_theta")}
    theta = written["rope_theta"] or config["rope_parameters"]["rope_theta"]
    rope = {**LLAMA3_ROPE, "rope_theta": theta}
    write_json(source / "config.json", {**config, "rope_parameters": rope})
    assert np.array_equal(exported(source, None, tmp_path / "after").encode(TEXTS), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("modernbert", "rope_parameters", {"full_attention": {"rope_theta": 1e4}}),
        ("qwen2", "rope_parameters", {"full_attention": {"rope_theta": 1e4}}),
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "is_decoder", True),
        ("bert", "hidden_act", "quick_gelu"),
        ("llama", "rope_scaling", {"rope_type": "longrope", "factor": 2.0}),
        ("llama", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("llama", "num_hidden_layers", 0),
        ("qwen3", "num_attention_heads", "four"),
        ("bert", "model_type", "t5"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_a_family_does_not_implement_is_refused_by_name(
    name: str, setting: str, value: Any, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = save(make_model(name), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    if name == "modernbert":
        config = {**config, "global_rope_theta": 160000.0}
    write_json(source / "config.json", {**config, setting: value})
    with pytest.raises(CheckpointError, match=setting):
        export_bundle(source, adapters={"task": None}, precisions=["fp32"], out=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("head", [4, 12])
def test_heads_of_any_even_size_run_at_every_precision(head: int, tmp_path: Path) -> None:
    source = save(make_model("qwen3", head_dim=head), tmp_path / "source", pooling="lasttoken")
    export_bundle(
        source, adapters={"t": None}, precisions=["fp32", "int8", "int4"], out=tmp_path / "out"
    )
    expected = Reference(source).encode(TEXTS)
    for precision, bound in (("fp32", BOUND), ("int8", 0.98), ("int4", 0.8)):
        found = Embedder(tmp_path / "out", precision=precision, threads=1).encode(TEXTS)
        assert cosines(found, expected).mean() >= bound


@pytest.mark.slow
def test_modernbert_as_transformers_5_saves_it(sources: dict[str, Path], tmp_path: Path) -> None:
    before = exported(sources["modernbert"], None, tmp_path / "before").encode(TEXTS)
    source = save(make_model("modernbert"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    thetas, every = (160000.0, 10000.0), 3
    for key in ("global_rope_theta", "local_rope_theta", "global_attn_every_n_layers"):
        config.pop(key, None)
    kinds = ("full_attention", "sliding_attention")
    rope = {
        kind: {"rope_theta": theta, "rope_type": "default"}
        for kind, theta in zip(kinds, thetas, strict=True)
    }
    types = [kinds[bool(i % every)] for i in range(config["num_hidden_layers"])]
    write_json(source / "config.json", {**config, "rope_parameters": rope, "layer_types": types})
    assert np.array_equal(exported(source, None, tmp_path / "after").encode(TEXTS), before)


@pytest.mark.parametrize(
    "types", [[["full_attention"]] * 4, "full_attention", {"a": 1}, [None] * 4]
)
@pytest.mark.parametrize("name", ["qwen3", "modernbert"])
def test_layer_types_of_other_types_are_refused(name: str, types: Any, tmp_path: Path) -> None:
    source = save(make_model(name, num_hidden_layers=4), tmp_path / "source", pooling="mean")
    config = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", {**config, "layer_types": types})
    with pytest.raises(CheckpointError, match="layer_types"):
        exported(source, None, tmp_path / "out")


@pytest.mark.slow
def test_a_token_that_the_table_lacks_is_warned_of_and_named(tmp_path: Path) -> None:
    source = save(make_model("bert"), tmp_path / "source")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["[one]"])
    tokenizer.save(str(source / "tokenizer.json"))
    with pytest.warns(EmbedgeWarning, match=r"96 rows of the model's table: '\[one\]' \(id 96\)"):
        export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "out")
    model = Embedder(tmp_path / "out", precision="fp32", threads=1)
    assert model.encode(["fine"]).shape == (1, 32)
    with pytest.raises(EmbedgeValueError, match=r"'\[one\]', a token that the tokenizer knows"):
        model.encode(["a [one] b"])


@pytest.mark.slow
def test_the_advised_conversion_of_pickled_weights_keeps_everything(tmp_path: Path) -> None:
    model = make_model("bert")
    source = save(model, tmp_path / "a source", pooling="cls")
    expected = Reference(source).encode(TEXTS)
    (source / "model.safetensors").unlink()
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="trust them: python") as caught:
        exported(source, None, tmp_path / "out")
    command = str(caught.value).partition("trust them: python")[2]
    subprocess.run(f"{shlex.quote(sys.executable)}{command}", shell=True, check=True)
    found = exported(source, None, tmp_path / "out").encode(TEXTS)
    assert cosines(found, expected).min() >= BOUND
