"""Decoders without a causal mask, and EuroBERT, against transformers' classes with PEFT's adapter unmerged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedge.export import CheckpointError
from tests.helpers.bidirectional import (
    BOUND,
    LONG,
    NATIVE,
    TEXTS,
    adapted,
    assert_parity,
    change,
    exported,
    long_model,
    vectors,
)
from tests.helpers.models import (
    LINEARS,
    WINDOW,
    Reference,
    cosines,
    save,
    save_adapter,
    write_json,
)

DECODERS = ("llama", "llama-with-biases", "mistral", "qwen2", "qwen2-sliding", "qwen3")
SLIDING = ("mistral", "qwen2-sliding")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {
        name: save(long_model(name), root / name, pooling="lasttoken", max_length=LONG)
        for name in DECODERS
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_that_is_not_causal_sees_all_tokens(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources[name]
    adapter = save_adapter(source, tmp_path / "adapter", target=rf".*({LINEARS['decoder']})")
    reference = adapted(source, adapter)  # causal by itself, so that the mask decides
    expected = vectors(reference, source, TEXTS, window=WINDOW if name in SLIDING else None)
    config = (source / "config.json").read_text()
    try:
        change(source, is_causal=False)
        model = exported(source, tmp_path / "out", adapters={"task": adapter})
        assert_parity(model, expected)
        if NATIVE:
            assert cosines(Reference(source, adapter).encode(TEXTS), expected).min() >= BOUND
    finally:
        (source / "config.json").write_text(config)
    causal = exported(source, tmp_path / "causal", adapters={"task": adapter})
    assert cosines(causal.encode(TEXTS[3:]), expected[3:]).max() < BOUND


# -- EuroBERT and llama_bidirec, whose published code is Llama without a causal mask -----------------

EUROBERT = {  # as EuroBERT-210m is published, but for its sizes
    "architectures": ["EuroBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_eurobert.EuroBertConfig",
        "AutoModel": "modeling_eurobert.EuroBertModel",
        "AutoModelForMaskedLM": "modeling_eurobert.EuroBertForMaskedLM",
        "AutoModelForPreTraining": "modeling_eurobert.EuroBertPreTrainedModel",
        "AutoModelForSequenceClassification": "modeling_eurobert.EuroBertForSequenceClassification",
    },
    "bos_token": "<s>",
    "bos_token_id": 2,
    "clf_pooling": "late",
    "eos_token": "</s>",
    "eos_token_id": 3,
    "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 56,
    "is_decoder": False,
    "mask_token": "<mask>",
    "mask_token_id": 4,
    "max_position_embeddings": 1024,
    "mlp_bias": False,
    "model_type": "eurobert",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pad_token": "<pad>",
    "pad_token_id": 1,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 250000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.40.0.dev0",
    "use_cache": False,
    "vocab_size": 96,
}
_EARLY = {
    *(
        "auto_map",
        "bos_token",
        "clf_pooling",
        "eos_token",
        "hidden_dropout",
        "is_decoder",
        "mask_token",
    ),
    *("pad_token", "rope_scaling", "rope_theta", "torch_dtype"),
}
NATIVE_EUROBERT = {  # as transformers 5 saves it
    **{key: value for key, value in EUROBERT.items() if key not in _EARLY},
    "architectures": ["EuroBertModel"],
    "classifier_pooling": "late",
    "dtype": "float32",
    "head_dim": 8,
    "rope_parameters": {"rope_theta": 250000, "rope_type": "default"},
    "transformers_version": "5.24.0",
}
BIDIREC = {
    "architectures": ["LlamaBidirectionalModel"],
    "auto_map": {
        "AutoConfig": "llama_bidirectional_model.LlamaBidirectionalConfig",
        "AutoModel": "llama_bidirectional_model.LlamaBidirectionalModel",
    },
    "model_type": "llama_bidirec",
    "pooling": "avg",
    "rope_scaling": None,
    "temperature": 0.02,
    "use_bidirectional_attention": True,
}


def llama_like(**changes: Any) -> Any:
    settings = {"num_key_value_heads": 4, "rope_theta": 250000.0, "rms_norm_eps": 1e-5, **changes}
    return long_model("llama", **settings)


def write_config(source: Path, config: dict[str, Any]) -> Path:
    write_json(source / "config.json", config)
    return source


def prefixed(source: Path) -> Path:
    """As a model with a language head has its tensors."""
    file = source / "model.safetensors"
    tensors = {f"model.{name}": tensor for name, tensor in load_file(file).items()}
    tensors["lm_head.weight"] = torch.randn(96, 32)
    save_file(tensors, file, metadata={"format": "pt"})
    return source


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["published", "transformers 5"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_eurobert_is_llama_that_sees_all_tokens(layout: str, kv_heads: int, tmp_path: Path) -> None:
    base = llama_like(num_key_value_heads=kv_heads)
    source = save(base, tmp_path / "source", pooling="mean", max_length=LONG)
    adapter = save_adapter(source, tmp_path / "adapter", target=rf".*({LINEARS['decoder']})")
    expected = vectors(adapted(source, adapter, base), source, TEXTS, pooling="mean")
    config = EUROBERT if layout == "published" else NATIVE_EUROBERT
    write_config(source, {**config, "num_key_value_heads": kv_heads})
    if NATIVE:
        assert cosines(Reference(source, adapter).encode(TEXTS), expected).min() >= BOUND
    if layout == "published":
        prefixed(source)
    assert_parity(exported(source, tmp_path / "out", adapters={"task": adapter}), expected)


@pytest.mark.slow
@pytest.mark.parametrize("with_modules", [True, False])
def test_llama_bidirec_is_llama_that_sees_all_tokens_averaged(
    with_modules: bool, tmp_path: Path
) -> None:
    base = llama_like()
    source = save(base, tmp_path / "source", normalize=with_modules, max_length=LONG)
    expected = vectors(base, source, TEXTS, pooling="mean", normalize=with_modules)
    change(source, **BIDIREC)
    if not with_modules:
        (source / "modules.json").unlink()
    assert_parity(exported(source, tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {"is_causal": None}, "is_causal: expected true or false, found None"),
        ({}, {"is_causal": 0}, "is_causal: expected true or false, found 0"),
        ({}, {"use_bidirectional_attention": True}, 'write "is_causal": false in its place'),
        ({}, {"bidirectional": True}, 'write "is_causal": false in its place'),
        (EUROBERT, {"rope_theta": ...}, "rope_theta: expected a number, found None"),
        (EUROBERT, {"is_decoder": True}, "is_decoder is true, expected null or false"),
        (EUROBERT, {"auto_map": {"AutoModel": "modeling_eurobert.Other"}}, "never run"),
        (
            EUROBERT,
            {"auto_map": {"AutoModel": "me/mine--modeling_eurobert.EuroBertModel"}},
            "auto_map names 'me/mine--",
        ),
        (BIDIREC, {"pooling": "cls"}, "pooling is 'cls', expected null or 'avg'"),
        (
            BIDIREC,
            {"use_bidirectional_attention": False},
            "attention is false, expected null or tr",
        ),
        (
            {"auto_map": EUROBERT["auto_map"]},
            {},
            "auto_map names 'modeling_eurobert.EuroBertModel' as AutoModel",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) and len(value) < 3 else "",
)
def test_what_a_mask_is_not_known_of_is_refused_by_name(
    config: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = save(llama_like(), tmp_path / "source")
    if config is EUROBERT:
        write_config(source, config)
    change(source, **{**config, **changes})
    with pytest.raises(CheckpointError, match=message):
        exported(source, tmp_path / "out")


def test_copies_of_eurobert_name_its_code_with_its_repository(tmp_path: Path) -> None:
    source = save(llama_like(), tmp_path / "source", max_length=LONG)
    code = {
        "AutoConfig": "EuroBERT/EuroBERT-610m--configuration_eurobert.EuroBertConfig",
        "AutoModel": "EuroBERT/EuroBERT-610m--modeling_eurobert.EuroBertModel",
    }
    write_config(source, {**EUROBERT, "auto_map": code})
    assert exported(source, tmp_path / "out").encode("a").shape == (32,)
