"""Small models of transformers with a random LoRA of PEFT on them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from embedge.export.adapters.adapter import Adapter, BoundAdapter
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


QUERY = "base_model.model.encoder.layer.0.attention.self.query"
