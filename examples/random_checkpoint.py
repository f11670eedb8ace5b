"""Writes checkpoints of embedding models in their published layouts and sizes, with random weights.

``python examples/random_checkpoint.py NAME FOLDER`` writes one of

- ``v5-nano``, ``v5-small``: jina-embeddings-v5-text with four LoRA adapters (0.5 GB, 1.3 GB);
- ``embeddinggemma``: EmbeddingGemma 300m with its two Dense layers (1.2 GB);
- ``nomic``: nomic-embed-text-v1.5 (0.5 GB).

Files, names, shapes and types are those of the published repositories; ``--layers`` takes fewer layers and
``--vocabulary`` fewer tokens. The residual stream has a few channels that are many times larger than the
others, each of one sign, as trained models have them; what reads the stream damps them, though not to the size
of the others. The tokenizer is a small one, made from the bench's texts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from outlier_channels import ENERGY, NOISE, OUTLIERS, Floats, Outliers
from published_configs import EMBEDDING_GEMMA, NOMIC
from published_sizes import SIZES, Size
from random_text_tower import write_json, write_tokenizer
from safetensors.torch import save_file

Shapes = Iterator[tuple[str, tuple[int, ...]]]
V5_TASKS = ("retrieval", "text-matching", "clustering", "classification")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _decoder_value(
    o: Outliers, size: Size, name: str, shape: tuple[int, ...], *, gemma: bool
) -> Floats:
    """A tensor of a Llama-like layer, or of Gemma's, whose norms hold their weight less 1."""
    offset, module = (1 if gemma else 0), name.removesuffix(".weight").rpartition(".")[2]
    if module == "embed_tokens":
        return o.table(name, shape, 1 / math.sqrt(size.hidden) if gemma else 1.0)
    if module in ("q_norm", "k_norm"):
        return o.draw(name, shape, 0.2) + 1 - offset
    each = 1 / math.sqrt(2 * size.layers)  # what a sublayer adds
    if gemma and module in ("post_attention_layernorm", "post_feedforward_layernorm"):
        weight = (o.draw(name, shape, 0.2) + 1) * each
        weight[o.channels] *= NOISE * o.sizes
        return weight - 1
    if "norm" in module:
        return o.reader_norm(name) - offset
    if module in ("o_proj", "down_proj"):  # the latter behind an activation and a product
        return o.writer(name, shape, each if module == "o_proj" else each / 0.6)
    sharp = {"q_proj": 1.4, "k_proj": 1.4, "gate_proj": 0.7, "up_proj": 0.7}
    return o.draw(name, shape, sharp.get(module, 1.0) * o.reader_gain(shape[1]))


def _decoder_shapes(size: Size, norms: tuple[str, ...], *, head_norms: bool) -> Shapes:
    yield "embed_tokens.weight", (size.vocabulary, size.hidden)
    for layer in range(size.layers):
        root = f"layers.{layer}."
        yield from ((f"{root}{name}.weight", shape) for name, shape in size.linears().items())
        yield from ((f"{root}{name}.weight", (size.hidden,)) for name in norms)
        if head_norms:
            for name in ("q_norm", "k_norm"):
                yield f"{root}self_attn.{name}.weight", (size.head_size,)
    yield "norm.weight", (size.hidden,)


def write_v5(folder: Path, size: Size, seed: int, *, small: bool) -> None:
    """jina-embeddings-v5-text: EuroBERT, or Qwen3 for the small one, and four adapters."""
    o = Outliers(size.hidden, seed)
    norms = ("input_layernorm", "post_attention_layernorm")
    shapes = _decoder_shapes(size, norms, head_norms=small)
    tensors = {name: _decoder_value(o, size, name, shape, gemma=False) for name, shape in shapes}
    _save(folder, tensors, torch.bfloat16)
    config = {
        "architectures": ["JinaEmbeddingsV5Model"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_jina_embeddings_v5.JinaEmbeddingsV5Config",
            "AutoModel": "modeling_jina_embeddings_v5.JinaEmbeddingsV5Model",
        },
        "bos_token_id": None,
        "eos_token_id": None,
        "head_dim": size.head_size,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": 0.02,
        "intermediate_size": size.inner,
        "is_decoder": small,
        "max_position_embeddings": size.positions,
        "model_type": "jina_embeddings_v5",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6 if small else 1e-5,
        "rope_scaling": None,
        "rope_theta": 3500000 if small else 1000000,
        "task_names": list(V5_TASKS),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": size.vocabulary,
    }
    write_json(folder / "config.json", config)
    write_json(
        folder / "modules.json",
        [
            {
                "idx": 0,
                "kwargs": ["task", "truncate_dim"],
                "name": "transformer",
                "path": "",
                "type": "custom_st.Transformer",
            }
        ],
    )
    prompts = {"query": "Query: ", "document": "Document: "}
    _sentence_settings(folder, prompts, "document")
    for task in V5_TASKS:
        _write_adapter(folder / "adapters" / task, o, size, task)


def _write_adapter(folder: Path, o: Outliers, size: Size, task: str, rank: int = 32) -> None:
    """A LoRA on all Linears that adds a quarter of what they give, with alpha = rank as published."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer in range(size.layers):
        for name, (rows, columns) in size.linears().items():
            key = f"base_model.model.layers.{layer}.{name}"
            reads = name not in ("self_attn.o_proj", "mlp.down_proj")
            gain = o.reader_gain(columns) if reads else 1 / math.sqrt(columns)
            size_added = 0.25 if reads else 0.25 / math.sqrt(2 * size.layers)
            tensors[f"{key}.lora_A.weight"] = o.draw(f"{task}{key}A", (rank, columns), gain)
            b = o.draw(f"{task}{key}B", (rows, rank), size_added / math.sqrt(rank))
            tensors[f"{key}.lora_B.weight"] = b
    _save(folder, tensors, torch.bfloat16, "adapter_model.safetensors")
    config = {
        "base_model_name_or_path": f"jinaai/{folder.parents[1].name}",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "lora_alpha": rank,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(LINEARS),
        "task_type": "FEATURE_EXTRACTION",
        "use_dora": False,
        "use_rslora": False,
    }
    write_json(folder / "adapter_config.json", config)


def write_embeddinggemma(folder: Path, size: Size, seed: int) -> None:
    """EmbeddingGemma 300m: Gemma 3's text model, bidirectional, two Dense layers behind its mean."""
    o = Outliers(size.hidden, seed)
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    shapes = _decoder_shapes(size, norms, head_norms=True)
    tensors = {name: _decoder_value(o, size, name, shape, gemma=True) for name, shape in shapes}
    _save(folder, tensors, torch.float32)
    sliding = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(size.layers)]
    config = {
        **EMBEDDING_GEMMA,
        "head_dim": size.head_size,
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "layer_types": sliding,
        "max_position_embeddings": size.positions,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocabulary,
    }
    write_json(folder / "config.json", config)
    dense = {"2_Dense": (4 * size.hidden, size.hidden), "3_Dense": (size.hidden, 4 * size.hidden)}
    for name, shape in dense.items():
        (folder / name).mkdir(exist_ok=True)
        weight = o.draw(name, shape, 1 / math.sqrt(shape[1]))
        _save(folder / name, {"linear.weight": weight}, torch.float32)
        settings = {
            "in_features": shape[1],
            "out_features": shape[0],
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        write_json(folder / name / "config.json", settings)
    _write_modules(folder, size, ["Dense", "Dense", "Normalize"])
    prompts = {"query": "task: search result | query: ", "document": "title: none | text: "}
    _sentence_settings(folder, prompts, None)


def write_nomic(folder: Path, size: Size, seed: int) -> None:
    """nomic-embed-text-v1.5: a BERT that normalizes after each sublayer, rotary, gated with SiLU."""
    o = Outliers(size.hidden, seed)
    o.soften(4)
    width, ones = size.hidden, np.ones(size.hidden, np.float32)
    rms = math.sqrt((width - OUTLIERS + float(np.sum(o.sizes**2))) / width)

    def norm(name: str) -> dict[str, Floats]:
        bias = o.draw(f"{name}.bias", (width,), 0.1)
        bias[o.channels] += o.shifts / 2
        weight = (o.draw(f"{name}.weight", (width,), 0.1) + ones) * np.float32(rms)
        weight[o.channels] /= np.float32(2 * rms)
        return {f"{name}.weight": weight, f"{name}.bias": bias}

    def reader(name: str, shape: tuple[int, int], size: float) -> Floats:
        weight = o.draw(name, shape, size / math.sqrt((1 + ENERGY) * shape[1]))
        weight[:, o.channels] *= o.damping
        return weight

    tensors = {
        "embeddings.word_embeddings.weight": o.table("words", (size.vocabulary, width), 0.05),
        "embeddings.token_type_embeddings.weight": o.draw("types", (2, width), 0.02),
        **norm("emb_ln"),
    }
    for layer in range(size.layers):
        p = f"encoder.layers.{layer}."
        tensors[f"{p}attn.Wqkv.weight"] = reader(f"{p}qkv", (3 * width, width), 1.2)
        tensors[f"{p}attn.out_proj.weight"] = o.writer(f"{p}out", (width, width), 0.5)
        for name in ("fc11", "fc12"):
            tensors[f"{p}mlp.{name}.weight"] = reader(f"{p}{name}", (size.inner, width), 0.7)
        tensors[f"{p}mlp.fc2.weight"] = o.writer(f"{p}fc2", (width, size.inner), 0.8)
        tensors |= norm(f"{p}norm1") | norm(f"{p}norm2")
    _save(folder, tensors, torch.float32)
    config = {
        **NOMIC,
        "n_embd": width,
        "n_head": size.heads,
        "n_inner": size.inner,
        "n_layer": size.layers,
        "n_positions": size.positions,
        "vocab_size": size.vocabulary,
    }
    write_json(folder / "config.json", config)
    _write_modules(folder, size, [])
    _sentence_settings(folder, {}, None)


WRITERS: dict[str, Callable[[Path, Size, int], None]] = {
    "v5-nano": lambda folder, size, seed: write_v5(folder, size, seed, small=False),
    "v5-small": lambda folder, size, seed: write_v5(folder, size, seed, small=True),
    "embeddinggemma": write_embeddinggemma,
    "nomic": write_nomic,
}


def write_checkpoint(
    name: str,
    folder: Path,
    seed: int = 0,
    *,
    layers: int | None = None,
    vocabulary: int | None = None,
) -> Path:
    """Write a model and return its folder; the same arguments give the same weights.

    Args:
        name: of :data:`WRITERS`.
        folder: made if it does not exist.
        seed: of the weights.
        layers: instead of the published number.
        vocabulary: rows of the token table, likewise.
    """
    size = SIZES[name]
    size = replace(size, layers=layers or size.layers, vocabulary=vocabulary or size.vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[name](folder, size, seed)
    write_tokenizer(folder, min(size.vocabulary, 32000), size.positions)
    return folder


def _save(
    folder: Path, tensors: dict[str, Floats], dtype: torch.dtype, file: str = "model.safetensors"
) -> None:
    stored = {name: torch.from_numpy(values).to(dtype) for name, values in tensors.items()}
    save_file(stored, folder / file, metadata={"format": "pt"})


def _sentence_settings(folder: Path, prompts: dict[str, str], default: str | None) -> None:
    settings = {
        "__version__": {"sentence_transformers": "5.1.0"},
        "default_prompt_name": default,
        "prompts": prompts,
        "similarity_fn_name": "cosine",
    }
    write_json(folder / "config_sentence_transformers.json", settings)


def _write_modules(folder: Path, size: Size, rest: list[str]) -> None:
    """modules.json with a mean, and the mean's settings."""
    kinds = ["Transformer", "Pooling", *rest]
    modules: list[dict[str, Any]] = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": size.positions})
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": size.hidden, "pooling_mode_mean_tokens": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(WRITERS))
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="fewer layers than published")
    parser.add_argument("--vocabulary", type=int, help="fewer rows of the token table")
    args = parser.parse_args()
    print(
        write_checkpoint(
            args.name, args.folder, args.seed, layers=args.layers, vocabulary=args.vocabulary
        )
    )


if __name__ == "__main__":
    main()
