"""Tiny models of every type, and what each key of their config.json is changed to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file

from embedge.export.families.config_keys import _ELSEWHERE, _FIXED, _HARMLESS
from embedge.export.families.known_keys import KEYS
from tests.helpers.bidirectional import NATIVE
from tests.helpers.models import make_model, save, write_json


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A model type whose keys are changed.

    Attributes:
        model: its entry in ``CONFIGS``, where its own name is none.
        settings: of the tiny model beyond that entry.
        values: what its keys are changed to, beyond ``VALUES``.
        causal: whether tokens see only what is before them.
        around: keys of config.json beside ``text_config``, which has the model's own; ``None`` without one.
    """

    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    causal: bool = False
    around: Mapping[str, Any] | None = None


EMBEDDING_GEMMA2: dict[str, Sequence[Any]] = {
    "hidden_size_per_layer_input": [16],
    "per_layer_config": [{}, None, {"1": {"head_dim": 8}}, {"0": {"head_dim": 4}}],
    "embedding_dim": [24],
    "global_head_dim": [8],
    "num_global_key_value_heads": [2],
    "sliding_window": [0, 9, None],
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
# Types that this version of transformers has no class for are left out: add yours in any case.
KINDS: dict[str, Kind] = {
    "bert": Kind(),
    "roberta": Kind(),
    "xlm-roberta": Kind(),
    "camembert": Kind(model="roberta"),
    "mpnet": Kind(),
    "distilbert": Kind(
        values={
            "activation": ["relu", "gelu_new", "quick_gelu"],
            "dim": [16, 64],
            "n_heads": [2, 8],
            "n_layers": [1, 3],
            "hidden_dim": [40],
        }
    ),
    "nomic_bert": Kind(
        values={
            "n_positions": [64, 40],
            "rotary_scaling_factor": [2.0],
            "rotary_emb_fraction": [1.0, 0.5],
            "activation_function": ["swiglu", "geglu", "gelu"],
            "qkv_proj_bias": [True, False],
            "n_embd": [32, 64],
            "rotary_emb_base": [1000, 50.0],
        }
    ),
    "jina_embeddings_v3": Kind(),
    "embedding_gemma2_text": Kind(values=EMBEDDING_GEMMA2),
    "embedding_gemma2": Kind(
        model="embedding_gemma2_text",
        values=EMBEDDING_GEMMA2
        | {"image_token_id": [60, None], "audio_config": [], "vision_config": []},
        around={"image_token_id": 40, "video_token_id": 41, "audio_token_id": 42},
    ),
    "gte": Kind(values={"layer_norm_type": ["rms_norm"], "pack_qkv": [False]}),
    "modernbert": Kind(
        settings={"num_hidden_layers": 3},
        values={"layer_types": [["sliding_attention", "full_attention", "full_attention"], "all"]},
    ),
    "eurobert": Kind(),
    "llama": Kind(settings={"rope_scaling": None}, causal=True),
    "mistral": Kind(causal=True),
    "qwen2": Kind(settings=WINDOWED, causal=True),
    "qwen3": Kind(settings=WINDOWED, causal=True),
    "gemma3_text": Kind(
        values={
            "sliding_window_pattern": [1, 3],
            "rope_local_base_freq": [50.0, None],
            "query_pre_attn_scalar": [7, 0, None],
        },
        causal=True,
    ),
    "qwen2_5_vl_text": Kind(
        settings={
            **WINDOWED,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]},
            "rope_theta": 1e4,
        },
        values={
            "rope_scaling": [
                {"type": "default", "mrope_section": [1, 1, 2]},
                {"rope_type": "linear", "factor": 3.0, "mrope_section": [2, 1, 1]},
                None,
            ],
            "image_token_id": [7],
            "vision_start_token_id": [7],
        },
        causal=True,
    ),
}
KINDS = {name: kind for name, kind in KINDS.items() if name in transformers.CONFIG_MAPPING}

# Values that a key is changed to; of others by their type.
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 33}
VALUES: dict[str, list[Any]] = {
    "hidden_act": ["relu", "gelu_new", "quick_gelu", "silu"],
    "hidden_activation": ["relu", "gelu_new", "quick_gelu"],
    "position_embedding_type": ["relative_key", "relative_key_query"],
    "rope_scaling": [
        {"rope_type": "linear", "factor": 3.0},
        {"type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        YARN,
        {"rope_type": "default", "rope_theta": 100.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
    "rope_parameters": [
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0},
        {"rope_type": "default", "rope_theta": 100.0},
        {"full_attention": {"rope_theta": 50.0, "rope_type": "default"}},
        {
            "full_attention": {"rope_theta": 50.0, "rope_type": "linear", "factor": 4.0},
            "sliding_attention": {"rope_theta": 20.0, "rope_type": "default"},
        },
    ],
    # version 4 does not read it: tests/export/families/test_bidirectional.py compares with a mask instead
    "is_causal": [True, 0, *([False] if NATIVE else [])],
    "rope_theta": [50.0, None],
    "global_rope_theta": [50.0],
    "local_rope_theta": [50.0, None],
    "layer_types": [["full_attention"], ["sliding_attention", "full_attention"], "all"],
    "sliding_window": [3, None],
    "local_attention": [2],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1],
    "global_attn_every_n_layers": [1, 2],
    "num_key_value_heads": [1, None],
    "num_attention_heads": [2, 8],
    "head_dim": [4, None],
    "max_position_embeddings": [64, 40],
    "pad_token_id": [0, 5, None],
    "type_vocab_size": [1, 3],
    "relative_attention_num_buckets": [16],
    "pruned_heads": [{"0": [1]}],
    "classifier_pooling": ["mean"],
    "classifier_activation": ["relu"],
    "hidden_size": [16, 64],
    "num_hidden_layers": [1, 3],
    "intermediate_size": [40],
    "vocab_size": [50, 200],
}
# Keys of other models and of fine-tuners' own classes: none may go by in silence.
FOREIGN: dict[str, Any] = {
    "attention_multiplier": 0.5,
    "attn_logit_softcapping": 30.0,
    "bidirectional": True,
    "embedding_multiplier": 2.0,
    "is_causal": "other way",
    "lora_rank": 4,
    "norm_type": "other",
    "partial_rotary_factor": 0.5,
    "pooling_type": "cls",
    "position_offset": 2,
    "query_pre_attn_scalar": 256,
    "residual_multiplier": 0.2,
    "rope_interleaved": True,
    "use_bidirectional_attention": "other way",
    "window_size": 3,
}


class Sources(dict[str, Path]):
    """Tiny models by their type, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> Path:
        kind = KINDS[name]
        model = make_model(kind.model or name, **kind.settings)
        self[name] = save(model, self.root / name, pooling="mean", max_length=40)
        if kind.around is not None:
            put_around(self[name], {"model_type": name, **kind.around})
        elif kind.model:
            change(self[name], model_type=name, architectures=None)
        return self[name]


def put_around(source: Path, around: Mapping[str, Any]) -> None:
    """Make a text model the ``language_model`` of one with these keys, and its keys ``text_config``."""
    config = json.loads((source / "config.json").read_text())
    config.pop("architectures")
    write_json(source / "config.json", {**around, "text_config": config})
    file = source / "model.safetensors"
    tensors = {f"language_model.{key}": value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def copied(source: Path, folder: Path) -> Path:
    """A copy of a model to change config.json in; the other files are links."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name == "config.json":
            shutil.copy(file, folder)
        else:
            (folder / file.name).symlink_to(file)
    return folder


def change(source: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    file = source / "config.json"
    config = json.loads(file.read_text())
    text = config.get("text_config")
    for key, value in changes.items():
        inner = isinstance(text, dict) and key not in config and key in known(text["model_type"])
        (text if inner else config)[key] = value
    for key in drop:
        for part in (config, text or {}):
            part.pop(key, None)
    write_json(file, config)


def known(kind: str) -> set[str]:
    """The keys that are known of a model type."""
    table = KEYS[kind]
    return {*table.used, *table.harmless, *table.fixed, *_HARMLESS, *_FIXED, *_ELSEWHERE}
