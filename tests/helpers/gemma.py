"""EmbeddingGemma's files in small: a published config.json, Gemma's tokenizer, the modules behind the transformer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import published_configs
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.helpers.models import write_json

PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}
# As google/embeddinggemma-300m has it, but for sizes.
EMBEDDING_GEMMA: dict[str, Any] = {
    **published_configs.EMBEDDING_GEMMA,
    "head_dim": 32,
    "hidden_size": 48,
    "intermediate_size": 72,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "max_position_embeddings": 1024,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 24,
    "sliding_window": 16,
    "transformers_version": "4.57.0.dev0",
    "vocab_size": 300,
}

# As EmbeddingGemma 2 has it, but for sizes.
EMBEDDING_GEMMA2: dict[str, Any] = {
    "architectures": ["EmbeddingGemma2Model"],
    "audio_config": None,
    "audio_token_id": 290,
    "boa_token_id": 256000,
    "boi_token_id": 255999,
    "dtype": "float32",
    "eoa_token_index": 258883,
    "eoi_token_id": 258882,
    "image_token_id": 291,
    "initializer_range": 0.02,
    "model_type": "embedding_gemma2",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "embedding_dim": 40,
        "eos_token_id": 1,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 48,
        "hidden_size_per_layer_input": 32,
        "initializer_range": 0.02,
        "intermediate_size": 72,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "max_position_embeddings": 1024,
        "model_type": "embedding_gemma2_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "per_layer_config": {"2": {"head_dim": 32, "num_key_value_heads": 1}},
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 8,
        "vocab_size": 300,
    },
    "transformers_version": "5.24.0",
    "video_token_id": 292,
    "vision_config": None,
}


def embedding_gemma2_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors of a text part by the names in a checkpoint of it alone."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    part, layers = config["hidden_size_per_layer_input"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config["vocab_size"], width),
        "norm.weight": (width,),
        "ple.per_layer_model_projection.weight": (layers * part, width),
        "ple.per_layer_projection_norm.weight": (part,),
        "embedding_projection.weight": (config["embedding_dim"], width),
    }
    for i in range(layers):
        own = config["per_layer_config"].get(str(i), {})
        size = own.get("head_dim", config["head_dim"])
        kv_heads = own.get("num_key_value_heads", config["num_key_value_heads"])
        matrices = {
            "self_attn.q_proj": (heads * size, width),
            "self_attn.k_proj": (kv_heads * size, width),
            "self_attn.v_proj": (kv_heads * size, width),
            "self_attn.o_proj": (width, heads * size),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "ple_block.per_layer_input_gate": (part, width),
            "ple_block.per_layer_projection": (width, part),
        }
        norms = {"self_attn.q_norm": size, "self_attn.k_norm": size}
        names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        norms |= {f"{name}_layernorm": width for name in names}
        norms["ple_block.post_per_layer_input_norm"] = width
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {f"layers.{i}.{name}.weight": (size,) for name, size in norms.items()}
        shapes[f"layers.{i}.layer_scalar"] = (1,)
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=draw)
        tensors[name] = 1 + 0.3 * noise if len(shape) == 1 else noise * 1.6 / shape[1] ** 0.5
    return tensors


def gemma_tokenizer() -> Tokenizer:
    """BPE with bytes for what the vocabulary lacks, spaces as ▁, wrapped in <bos> and <eos>."""
    pairs = [("h", "e"), ("▁", "t"), ("▁t", "he"), ("i", "n")]
    letters = "abcdefghijklmnopqrstuvwxyz▁:|"
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *letters]
    vocabulary = {token: i for i, token in enumerate([*tokens, *("".join(p) for p in pairs)])}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> <bos> $B <eos>",
        special_tokens=[("<bos>", 2), ("<eos>", 1)],
    )
    return tokenizer


def write_pipeline(folder: Path, width: int, *dense: int, max_length: int = 1024) -> None:
    """Write the tokenizer, the prompts, and mean pooling, Dense without bias, normalization.

    Args:
        folder: where the transformer's files lie.
        width: of its states.
        *dense: widths of the Dense layers.
        max_length: the most tokens of a text.
    """
    gemma_tokenizer().save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
    ends = {"add_bos_token": True, "add_eos_token": True, "model_max_length": max_length}
    settings = {"tokenizer_class": "GemmaTokenizer", **names, **ends, "padding_side": "right"}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length})
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": PROMPTS,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    write_json(folder / "1_Pooling/config.json", {**pooling, "include_prompt": True})
    generator = torch.Generator().manual_seed(11)
    for number, out in enumerate(dense, 2):
        place = folder / f"{number}_Dense"
        modules.append((place.name, "Dense"))
        write_json(
            place / "config.json",
            {
                "in_features": width,
                "out_features": out,
                "bias": False,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
        )
        weight = torch.randn(out, width, generator=generator) / width**0.5
        save_file({"linear.weight": weight}, place / "model.safetensors")
        width = out
    modules.append((f"{len(dense) + 2}_Normalize", "Normalize"))
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )


def change_tensors(
    folder: Path,
    part: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    *,
    weights: str = "model",
) -> None:
    """Replace the tensors whose names contain a part by what a function makes of them."""
    file = folder / f"{weights}.safetensors"
    tensors = load_file(file)
    names = [name for name in tensors if part in name]
    assert names, part
    tensors |= {name: change(tensors[name]) for name in names}
    save_file(tensors, file, metadata={"format": "pt"})


def read_config(source: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    return config


def texts_of(lengths: list[int], seed: int = 0) -> list[str]:
    """Texts of so many tokens, <bos> and <eos> included."""
    draw = np.random.default_rng(seed)
    letters = list("abcdfgjklmopqrsuvwxyz")  # no merges
    return ["".join(draw.choice(letters, n - 2)) for n in lengths]


def with_outliers(
    tensors: Mapping[str, torch.Tensor], *, width: int, norm_offset: float
) -> dict[str, torch.Tensor]:
    """A model whose residual stream has channels 40 times the others, and each MLP one of 60 times.

    Norms behind sublayers make the stream's, norms before Linears leave 8 times, the Linears take that back.

    Args:
        tensors: of a random model, by name.
        width: channels of the stream.
        norm_offset: what norms add to their weights.
    """
    channels, large, left, inner = [3, 17, 30], 40.0, 8.0, 60.0
    lift = large * (len(channels) / width) ** 0.5  # about the stream's root mean square
    found = {name: value.clone() for name, value in tensors.items()}
    for name, value in found.items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        if value.ndim == 1 and len(value) > 1 and "norm" in module:
            weight = 1 + 0.3 * (value + norm_offset - 1)
            if module.startswith("post_"):
                weight *= 0.4
                weight[channels] *= large
            elif module in (
                "q_norm",
                "k_norm",
            ):  # scores of a size at which attention is no maximum
                weight *= 0.7 if norm_offset else 1.25 / len(weight) ** 0.25
            elif len(weight) == width and module != "per_layer_projection_norm":
                weight *= lift
                weight[channels] *= left / large
            found[name] = weight - norm_offset
        elif module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            value[:, channels] /= left
        elif module == "per_layer_input_gate":
            value[:, channels] /= large
    for name, value in found.items():
        if name.endswith("up_proj.weight"):
            value[5] *= inner
        if name.endswith("down_proj.weight"):
            value[:, 5] /= inner
    return found
