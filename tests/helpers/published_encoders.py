"""Encoders with rotary positions: random weights as transformers 5 saves them and as their authors published them.

No class of transformers makes them, so that they are there beside any version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import published_configs
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.models import VOCAB, write_json

Tensors = dict[str, torch.Tensor]

# config.json as transformers 5 saves it, small
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 1100,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-12,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "nomic_bert": {
        "architectures": ["NomicBertModel"],
        "head_dim": 8,
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"},
        "type_vocab_size": 2,
    },
    "gte": {
        "architectures": ["GteModel"],
        "hidden_act": "gelu",
        "rope_parameters": {"rope_theta": 160000.0, "rope_type": "default"},
        "type_vocab_size": 1,
    },
}
JINA_V3: dict[str, Any] = {
    "architectures": ["JinaEmbeddingsV3Model"],
    "hidden_act": "gelu",
    "intermediate_size": 56,
    "layer_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"},
    "type_vocab_size": 1,
}
CONFIGS["jina_embeddings_v3"] = JINA_V3
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
BIASED: dict[str, tuple[str, ...]] = {"nomic_bert": (), "gte": (*ATTENTION, "down_proj")}
GATED = ("gate_proj", "up_proj", "down_proj")
MLPS: dict[str, tuple[str, ...]] = {"nomic_bert": GATED, "gte": GATED}
BIASED["jina_embeddings_v3"] = (*ATTENTION, "fc1", "fc2")
MLPS["jina_embeddings_v3"] = ("fc1", "fc2")


@dataclass
class Encoder:
    """Stands for a model of transformers where :func:`tests.helpers.models.save` takes one.

    Attributes:
        settings: its config.json.
        tensors: its weights.
    """

    settings: dict[str, Any]
    tensors: Tensors

    @property
    def config(self) -> SimpleNamespace:
        """What is read of its configuration."""
        return SimpleNamespace(hidden_size=self.settings["hidden_size"])

    def save_pretrained(self, folder: Path) -> None:
        """Write weights and config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", self.settings)


def make_encoder(kind: str, seed: int = 0, gain: float = 1.6, **changes: Any) -> Encoder:
    """An encoder whose every tensor is random: sensible sizes, nothing zero, no norm at 1."""
    config = {"model_type": kind, **SIZES, **CONFIGS[kind], **changes}
    generator = torch.Generator().manual_seed(seed)
    width, inner = config["hidden_size"], config["intermediate_size"]
    if "head_dim" in config:
        config["head_dim"] = width // config["num_attention_heads"]
    tensors: Tensors = {}

    def linear(name: str, out: int, into: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(out, into, generator=generator) * gain / into**0.5
        if name.rpartition(".")[2] in BIASED[kind]:
            tensors[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.3

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
        tensors[f"{name}.bias"] = 0.3 * torch.randn(width, generator=generator)

    linear("embeddings.word_embeddings", config["vocab_size"], width)
    if config["type_vocab_size"]:
        linear("embeddings.token_type_embeddings", config["type_vocab_size"], width)
    norm("embeddings.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        p = f"layers.{layer}."
        for name in ATTENTION:
            linear(f"{p}self_attn.{name}", width, width)
        *ups, down = MLPS[kind]
        for name in ups:
            linear(f"{p}mlp.{name}", inner, width)
        linear(f"{p}mlp.{down}", width, inner)
        norm(f"{p}post_attention_layernorm")
        norm(f"{p}post_mlp_layernorm")
    return Encoder(config, tensors)


def spoil(tensors: Tensors) -> None:
    """Outlier channels as large encoders have them: what is large in the stream, its readers make small again."""
    stream, inner = [3, 17], [5, 29]
    for key, value in tensors.items():
        if re.search(r"(?i)layernorm\.(weight|bias)", key):
            value[stream] *= 20
        elif re.search(r"(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)\.weight", key):
            value[:, stream] /= 20
        if re.search(r"(v_proj|up_proj)\.", key):
            value[inner] *= 20
        elif re.search(r"(o_proj|down_proj)\.weight", key):
            value[:, inner] /= 20


def save_lora(
    folder: Path, modules: Mapping[str, tuple[int, ...]], rank: int = 3, size: float = 0.7
) -> Path:
    """Write an adapter as PEFT does, of random A and B: modules and the shapes of their weights."""
    tensors: Tensors = {}
    for module, (out, into) in modules.items():
        generator = torch.Generator().manual_seed(crc32(module.encode()))
        for factor, shape in (("lora_A", (rank, into)), ("lora_B", (out, rank))):
            values = torch.randn(*shape, generator=generator) * size / shape[1] ** 0.5
            tensors[f"base_model.model.{module}.{factor}.weight"] = values
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": names}
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": "native"})
    return folder


def rewrite(
    folder: Path,
    tensors: Callable[[Tensors], Tensors],
    config: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> Path:
    """Change the weights and the config.json of a folder."""
    file = folder / "model.safetensors"
    changed = {key: value.clone() for key, value in tensors(load_file(file)).items()}
    save_file(changed, file, metadata={"format": "pt"})
    before = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config(before))
    return folder


def fused(tensors: Tensors, names: Mapping[str, tuple[str, ...]]) -> Tensors:
    """Modules of each layer side by side in one: by its name, theirs."""
    left = dict(tensors)
    for whole, parts in names.items():
        for key in sorted(tensors):
            before, found, what = key.rpartition(f"{parts[0]}.")
            if found:
                rows = [left.pop(f"{before}{part}.{what}") for part in parts]
                left[f"{before}{whole}.{what}"] = torch.cat(rows)
    return left


def renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    """By regular expressions, applied in order."""
    for old, new in names.items():
        tensors = {re.sub(old, new, key): value for key, value in tensors.items()}
    return tensors


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def nomic_tensors(tensors: Tensors, prefix: str = "") -> Tensors:
    """As nomic-embed-text v1 and v1.5 hold them."""
    names = {
        r"^layers\.": "encoder.layers.",
        r"^embeddings\.LayerNorm": "emb_ln",
        r"self_attn\.o_proj": "attn.out_proj",
        r"mlp\.up_proj": "mlp.fc11",
        r"mlp\.gate_proj": "mlp.fc12",
        r"mlp\.down_proj": "mlp.fc2",
        "post_attention_layernorm": "norm1",
        "post_mlp_layernorm": "norm2",
        "^": prefix,
    }
    return renamed(fused(tensors, {"attn.Wqkv": QKV}), names)


NOMIC_CODE = published_configs.NOMIC["auto_map"]


def nomic_config(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """nomic-embed-text-v1.5's config.json with the sizes of another."""
    published = {
        **published_configs.NOMIC,
        "layer_norm_epsilon": config["layer_norm_eps"],
        "n_embd": config["hidden_size"],
        "n_head": config["num_attention_heads"],
        "n_inner": config["intermediate_size"],
        "n_layer": config["num_hidden_layers"],
        "n_positions": config["max_position_embeddings"],
        "transformers_version": "4.37.2",
        "vocab_size": config["vocab_size"],
    }
    return {**published, **changes}


def gte_tensors(tensors: Tensors, prefix: str = "") -> Tensors:
    """As gte-multilingual-base (with the prefix ``new.``) and snowflake-arctic-embed-m-v2.0 hold them."""
    parts = {"attention.qkv_proj": QKV, "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj")}
    names = {
        r"^layers\.": "encoder.layer.",
        r"self_attn\.o_proj": "attention.o_proj",
        "post_attention_layernorm": "attn_ln",
        "post_mlp_layernorm": "mlp_ln",
        "^": prefix,
    }
    return renamed(fused(tensors, parts), names)


NEW_CODE = {
    "AutoConfig": "Alibaba-NLP/new-impl--configuration.NewConfig",
    "AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel",
}


def gte_config(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """gte-multilingual-base's config.json with the sizes of another."""
    sizes = {key: config[key] for key in SIZES}
    published = {
        "architectures": ["NewModel"],
        "attention_probs_dropout_prob": 0.0,
        "auto_map": NEW_CODE,
        "classifier_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "layer_norm_type": "layer_norm",
        "logn_attention_clip1": False,
        "logn_attention_scale": False,
        "model_type": "new",
        "pack_qkv": True,
        "position_embedding_type": "rope",
        "rope_scaling": {"factor": 8.0, "type": "ntk"},
        "rope_theta": 20000,
        "torch_dtype": "float16",
        "transformers_version": "4.39.1",
        "type_vocab_size": config["type_vocab_size"],
        "unpad_inputs": False,
        "use_memory_efficient_attention": False,
    }
    return {**sizes, **published, **changes}


JINA_TASKS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
    "separation": "",
    "classification": "",
    "text-matching": "",
}
JINA_RANK, JINA_ALPHA = 3, 8
JINA_CODE = {
    "AutoConfig": "jinaai/xlm-roberta-flash-implementation--configuration_xlm_roberta.XLMRobertaFlashConfig",
    "AutoModel": "jinaai/xlm-roberta-flash-implementation--modeling_lora.XLMRobertaLoRA",
    "AutoModelForMaskedLM": "jinaai/xlm-roberta-flash-implementation--modeling_xlm_roberta.XLMRobertaForMaskedLM",
}


def jina_tensors(tensors: Tensors, size: float = 0.7) -> Tensors:
    """As jina-embeddings-v3 holds them, with random adapters of all tasks for every Linear and table."""
    names = {
        r"^layers\.": "encoder.layers.",
        r"^embeddings\.LayerNorm": "emb_ln",
        r"self_attn\.o_proj": "mixer.out_proj",
        "post_attention_layernorm": "norm1",
        "post_mlp_layernorm": "norm2",
        "^": "roberta.",
    }
    base = renamed(fused(tensors, {"mixer.Wqkv": QKV}), names)
    base["roberta.pooler.dense.weight"] = torch.ones(4, 4)
    found: Tensors = {}
    for key, value in base.items():
        if value.ndim != 2:
            found[key] = value
            continue
        generator = torch.Generator().manual_seed(crc32(key.encode()))
        module = key.removesuffix(".weight")
        table, (out, into) = "embeddings" in key, value.shape
        shapes = {"A": (JINA_RANK, into), "B": (out, JINA_RANK)}
        if table:  # the two change places
            shapes = {"A": (out, JINA_RANK), "B": (JINA_RANK, into)}
        found[f"{module}.parametrizations.weight.original"] = value
        for factor, shape in shapes.items():
            stack = torch.randn(len(JINA_TASKS), *shape, generator=generator)
            stack *= size / (into if table else shape[1]) ** 0.5
            found[f"{module}.parametrizations.weight.0.lora_{factor}"] = stack
    found["roberta.pooler.dense.bias"] = torch.ones(4)
    return found


def jina_config(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """jina-embeddings-v3's config.json with the sizes of another."""
    sizes = {key: config[key] for key in SIZES}
    published = {
        "_name_or_path": "jinaai/jina-embeddings-v3",
        "architectures": ["XLMRobertaModel"],
        "attention_probs_dropout_prob": 0.1,
        "auto_map": JINA_CODE,
        "bos_token_id": 0,
        "classifier_dropout": None,
        "emb_pooler": None,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "load_trained_adapters": True,
        "lora_adaptations": list(JINA_TASKS),
        "lora_alpha": JINA_ALPHA,
        "lora_dropout_p": 0.0,
        "lora_main_params_trainable": False,
        "lora_rank": JINA_RANK,
        "matryoshka_dimensions": [16, config["hidden_size"]],
        "model_type": "xlm-roberta",
        "output_past": True,
        "position_embedding_type": "rotary",
        "rotary_emb_base": 20000.0,
        "task_instructions": JINA_TASKS,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.30.2",
        "truncate_dim": None,
        "type_vocab_size": 1,
        "use_cache": True,
        "use_flash_attn": True,
        "use_reentrant": False,
    }
    return {**sizes, **published, **changes}


def jina_adapter(published: Tensors, task: int, folder: Path) -> Path:
    """One task's adapter of :func:`jina_tensors` as PEFT saves it for transformers 5's model."""
    tensors: Tensors = {}
    native = {"encoder.layers.": "layers.", "mixer.out_proj": "self_attn.o_proj"}
    for key, stack in published.items():
        before, found, factor = key.partition(".parametrizations.weight.0.lora_")
        if not found or "pooler" in key:
            continue
        module = before.removeprefix("roberta.")
        for old, new in native.items():
            module = module.replace(old, new)
        prefix, value = f"base_model.model.{module}", stack[task]
        if "embeddings" in module:  # (A · B) there, (B · A) transposed here
            tensors[f"{prefix}.lora_embedding_{factor}"] = value.T.contiguous()
        elif "mixer.Wqkv" not in module:
            tensors[f"{prefix}.lora_{factor}.weight"] = value.clone()
        else:
            parts = [value] * 3 if factor == "A" else value.chunk(3)
            for name, part in zip(QKV, parts, strict=True):
                own = prefix.replace("mixer.Wqkv", name)
                tensors[f"{own}.lora_{factor}.weight"] = part.clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": JINA_RANK, "lora_alpha": JINA_ALPHA}
    targets = [*ATTENTION, "fc1", "fc2", "word_embeddings", "token_type_embeddings"]
    config |= {"target_modules": targets, "base_model_name_or_path": "jinaai/jina-embeddings-v3-hf"}
    write_json(folder / "adapter_config.json", config)
    return folder
