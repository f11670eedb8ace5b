"""A transformer as a GGUF file: Llama, Qwen2, Qwen3, EuroBERT and BERT, matrices in float16, no tokenizer.

The file has no vocabulary but a count of tokens: whoever runs it gives ids or rows of the table.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.bench.errors import BenchError

__all__ = ["ENCODERS", "FAMILIES", "GgufError", "read_table", "write_gguf"]

ENCODERS = ("bert", "eurobert")
FAMILIES = ("llama", "qwen2", "qwen3", *ENCODERS)
_TABLE = "token_embd"
_DECODER_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_BERT_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_OUTSIDE = {
    "embed_tokens": _TABLE,
    "norm": "output_norm",
    "embeddings.word_embeddings": _TABLE,
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
_FLOAT32 = ("position_embd", "token_types")  # added to every token, never multiplied


class GgufError(BenchError):
    """The model has something that the file, or llama.cpp's graph of the family, does not."""


def write_gguf(model: Any, file: Path, rows: int | None = None) -> None:
    """Write a ``LlamaModel``, ``Qwen2Model``, ``Qwen3Model``, ``EuroBertModel`` or ``BertModel`` of transformers.

    Args:
        model: in torch, any float type.
        file: where to.
        rows: of the token table, its first ones; ``None``: all.

    Raises:
        GgufError: another family, or a setting that llama.cpp's graph of it has not.
    """
    import gguf

    config = model.config
    _check(config)
    logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type in ENCODERS:
        writer.add_causal_attention(False)
    if config.model_type == "bert":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_token_type_count(config.type_vocab_size)
    else:
        width = _head_width(config)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(width)
        writer.add_value_length(width)
        writer.add_rope_dimension_count(width)
        writer.add_rope_freq_base(_rope(config)["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(rows or config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, values in _tensors(model, rows):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_table(file: Path) -> NDArray[np.float32]:
    """Return the token table of a GGUF file as its type rounds it, float32 ``[tokens, width]``."""
    import gguf

    tensors = gguf.GGUFReader(file).tensors
    tensor = next(tensor for tensor in tensors if tensor.name == f"{_TABLE}.weight")
    table = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return np.array(table, dtype=np.float32)


def _check(config: Any) -> None:
    if config.model_type not in FAMILIES:
        raise GgufError(f"model_type {config.model_type}: written are {', '.join(FAMILIES)}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    activation = "gelu" if config.model_type == "bert" else "silu"
    found = {
        _rope_key(config): _rope(config)["rope_type"] != "default",
        "mlp_bias": getattr(config, "mlp_bias", False),
        "hidden_act": config.hidden_act != activation,
        "layer_types": kinds != {"full_attention"},
        "position_embedding_type": getattr(config, "position_embedding_type", "absolute")
        != "absolute",
    }
    odd = [f"{name}={getattr(config, name)}" for name, is_odd in found.items() if is_odd]
    if odd:
        raise GgufError(f"{', '.join(odd)}: expected a plain {config.model_type}; not written")


def _rope_key(config: Any) -> str:
    return "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling"


def _rope(config: Any) -> dict[str, Any]:
    """Kind and theta: one dictionary in transformers 5, two attributes in 4."""
    own = getattr(config, _rope_key(config), None) or {}
    theta = own.get("rope_theta", getattr(config, "rope_theta", None))
    return {"rope_type": own.get("rope_type", own.get("type", "default")), "rope_theta": theta}


def _head_width(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _tensors(model: Any, rows: int | None) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield names and values, matrices in float16, vectors in float32.

    Raises:
        GgufError: a tensor that no name of the file stands for.
    """
    config = model.config
    bert = config.model_type == "bert"
    layer, prefix = (_BERT_LAYER, "encoder.layer.") if bert else (_DECODER_LAYER, "layers.")
    for name, tensor in model.state_dict().items():
        values = tensor.detach().float().numpy()
        module, _, parameter = name.rpartition(".")
        number, _, rest = module.removeprefix(prefix).partition(".")
        if module in _OUTSIDE:
            target = _OUTSIDE[module]
            values = values[:rows] if target == _TABLE else values
        elif module.startswith(prefix) and rest in layer:
            target = f"blk.{number}.{layer[rest]}"
        elif bert and module.startswith("pooler"):
            continue
        else:
            raise GgufError(f"{name}: expected a tensor of a plain {config.model_type}")
        if config.model_type == "llama" and rest == "self_attn.q_proj":
            values = _pairs_adjacent(values, config.num_attention_heads)
        if config.model_type == "llama" and rest == "self_attn.k_proj":
            values = _pairs_adjacent(values, config.num_key_value_heads)
        wide = values.ndim == 1 or target in _FLOAT32
        yield f"{target}.{parameter}", values.astype(np.float32 if wide else np.float16)


def _pairs_adjacent(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Return rows in the order of llama.cpp's Llama: the two of a rotated pair beside each other.

    Transformers rotates channel i with channel i + half of a head; Qwen2 keeps that order.
    """
    halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
