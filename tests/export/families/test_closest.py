"""A model that no family serves is refused at once, with the architecture that is closest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from embedge.export import CheckpointError, export_bundle
from embedge.export.families import FAMILIES, family_of
from embedge.export.families.closest import HOW_TO_ADD, KIN
from tests.helpers.models import make_model, save, write_json
from tests.helpers.weight_files import write_model

ROOT = Path(__file__).resolve().parents[3]
SUPPORTED = {kind for family in FAMILIES for kind in family.model_types}
LIKE_A_DECODER = {
    "hidden_size": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "listed": (
        {"model_type": "deberta-v2"},
        "model_type 'deberta-v2' is not supported; the closest supported one is bert, from which this model "
        "differs: its attention scores contents and relative positions apart. ",
    ),
    "with nothing near": (
        {"model_type": "mamba"},
        "model_type 'mamba' is not supported; no supported one is near: it has state spaces where the "
        "supported ones have attention. ",
    ),
    "under another's name": (
        {
            "model_type": "bert",
            "architectures": ["JinaBertForMaskedLM"],
            "auto_map": {
                "AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"
            },
        },
        "this is jina-bert v2 (model_type 'bert'), which is not supported; the closest supported one is bert, "
        "from which this model differs: its positions are ALiBi, and its MLP has a gate. ",
    ),
    "misspelt": (
        {"model_type": "xlm_roberta"},
        "model_type 'xlm_roberta' is not supported; the closest supported one by its name is xlm-roberta. ",
    ),
    "without a type": (
        {},
        "expected a model_type, found none; no supported one is near: there are "
        f"{', '.join(sorted(SUPPORTED))}. ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_closest_supported_architecture_is_named(case: str) -> None:
    config, expected = REFUSED[case]
    with pytest.raises(CheckpointError) as caught:
        family_of(config)
    assert str(caught.value) == f"config.json: {expected}{HOW_TO_ADD}"


PUBLISHED: dict[str, tuple[dict[str, Any], str]] = {
    "microsoft/deberta-v3-base": (
        {"model_type": "deberta-v2", "relative_attention": True, "pos_att_type": "p2c|c2p"},
        "bert",
    ),
    "sentence-transformers/gtr-t5-base": (
        {"model_type": "t5", "architectures": ["T5EncoderModel"], "d_model": 768},
        "mpnet",
    ),
    "Muennighoff/SGPT-125M": ({"model_type": "gpt_neo", "architectures": ["GPTNeoModel"]}, "llama"),
    "openai-community/gpt2": ({"model_type": "gpt2", "n_embd": 768, "n_head": 12}, "llama"),
    "state-spaces/mamba-130m-hf": ({"model_type": "mamba", "state_size": 16}, ""),
    "Qwen/Qwen3-VL-Embedding-2B": (
        {"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}},
        "qwen2_5_vl",
    ),
    "jinaai/jina-embeddings-v2-base-code": (
        {
            "model_type": "bert",
            "position_embedding_type": "alibi",
            "auto_map": {
                "AutoModel": "jinaai/jina-bert-v2-qk-post-norm--modeling_bert.JinaBertModel"
            },
        },
        "bert",
    ),
    "nomic-ai/nomic-embed-text-v2-moe": (
        {"model_type": "nomic_bert", "moe_every_n_layers": 2, "num_experts": 8, "moe_top_k": 2},
        "nomic_bert",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_told_what_is_closest(name: str, tmp_path: Path) -> None:
    config, closest = PUBLISHED[name]
    source = write_model(tmp_path / "model", **config)
    said = (
        f"the closest supported one is {closest}, from" if closest else "no supported one is near: "
    )
    with pytest.raises(CheckpointError) as caught:
        export_bundle(source, adapters={"task": None}, out=tmp_path / "out")
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{source / 'config.json'}: ")
    assert str(caught.value).endswith(HOW_TO_ADD)


@pytest.mark.parametrize("config", [c for c, _ in REFUSED.values()], ids=list(REFUSED))
@pytest.mark.parametrize("value", [None, 3, "x", [3], {"a": []}])
def test_settings_of_any_kind_are_refused_by_the_same_message(
    config: dict[str, Any], value: Any
) -> None:
    odd = dict.fromkeys(LIKE_A_DECODER, value) | {"num_local_experts": value, **config}
    with pytest.raises(CheckpointError, match="closest supported|no supported one is near"):
        family_of(odd, tensors=lambda: ["layers.0.self_attn.q_proj.weight"])


def test_keys_tell_an_architecture_without_tensors() -> None:
    said = r"by the keys of config\.json is [\w-]+, of whose 1\d it has 8\."
    with pytest.raises(CheckpointError, match=said):
        family_of({"model_type": "zzz", **LIKE_A_DECODER})


def test_tensors_tell_an_architecture_of_an_unknown_name(tmp_path: Path) -> None:
    source = save(make_model("llama"), tmp_path / "model")
    config = json.loads((source / "config.json").read_text("utf-8"))
    write_json(source / "config.json", config | {"model_type": "an-unknown-name"})
    said = r"by the names of its tensors is [\w-]+, of which it has 11, beside 0 others\."
    with pytest.raises(CheckpointError, match=said):
        export_bundle(source, adapters={"task": None}, out=tmp_path / "out")


def test_it_is_refused_before_its_weights_are_looked_at(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", model_type="t5")
    (source / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(
        CheckpointError, match="'t5' is not supported; the closest supported one is mpnet"
    ):
        export_bundle(source, adapters={"task": None}, out=tmp_path / "out")


def test_the_table_names_architectures_that_are_not_supported_and_some_that_are() -> None:
    assert KIN.keys() & SUPPORTED == set()
    assert {kin.closest for kin in KIN.values() if kin.closest} <= SUPPORTED


def test_where_the_message_sends_to_is_there() -> None:
    assert "## Where do I add a family?" in (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert [p for p in re.findall(r"docs/[\w./-]+md", HOW_TO_ADD) if not (ROOT / p).is_file()] == []
