"""The reference's base as bitsandbytes restores it: what adapters of QLoRA were trained on, in float32."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from embedge.bench.errors import BenchError
from embedge.runtime.bundle.manifest import BaseQuantization
from embedge.runtime.host.install_advice import install_command

__all__ = ["check_readable", "quantize_linears", "restore_linears"]

_NAMES = ("accelerate", "bitsandbytes")


def check_readable(transformer: Path) -> None:
    """Refuse a base that bitsandbytes has quantized, or is to quantize, where it is not installed.

    Raises:
        BenchError: with the command that installs it.
    """
    if missing := [name for name in _NAMES if find_spec(name) is None]:
        raise BenchError(
            f"{transformer}: the reference is the base as bitsandbytes quantizes it, and {' and '.join(missing)} is "
            f"not installed; run: {install_command('torch-peers', missing)}"
        )


def quantize_linears(model: Any, transformer: Path, how: BaseQuantization) -> Any:
    """Return ``model`` with the Linears of its folder as bitsandbytes quantizes and restores them.

    Args:
        model: in float32, of the folder.
        transformer: the folder with config.json and the original weights.
        how: the bundle's.

    Raises:
        BenchError: blocks of another size than 64, which transformers has no setting for.
    """
    check_readable(transformer)
    if how.block_size not in (None, 64):
        raise BenchError(
            f"{transformer}: the bundle's base was quantized in blocks of {how.block_size}, which transformers does "
            "not load, so that there is no reference to compare with; expected 64"
        )
    from transformers import AutoModel, BitsAndBytesConfig

    settings: dict[str, Any] = {"llm_int8_skip_modules": list(how.skip) or None}
    if how.kind == "int8":
        settings["load_in_8bit"] = True
    else:
        settings |= {"load_in_4bit": True, "bnb_4bit_quant_type": how.kind}
        settings["bnb_4bit_use_double_quant"] = how.double_quant
    make: Any = BitsAndBytesConfig  # untyped
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes' own, of torch
        loaded = AutoModel.from_pretrained(
            transformer,
            quantization_config=make(**settings),
            dtype=getattr(torch, how.dtype),
            device_map="cpu",
        )
    for name, weight in _restored(loaded):
        model.get_submodule(name).weight.data = weight
    return model


def restore_linears(model: Any) -> Any:
    """Return a model that was loaded quantized as one in float32, with its Linears restored."""
    from transformers import AutoModel

    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = AutoModel.from_config(config, dtype=torch.float32)
    restored = {f"{name}.weight": weight for name, weight in _restored(model)}
    stored = model.state_dict()
    plain.load_state_dict(
        {
            name: restored[name] if name in restored else stored[name].to(value.dtype)
            for name, value in plain.state_dict().items()
        }
    )
    return plain.eval()


def _restored(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names of bitsandbytes' Linears, and their weights restored, float32 ``[out, in]``."""
    from bitsandbytes import functional, nn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, module in list(model.named_modules()):
            weight: Any = getattr(module, "weight", None)
            if isinstance(module, nn.Linear4bit):
                yield name, functional.dequantize_4bit(weight.data, weight.quant_state).float()
            elif isinstance(module, nn.Linear8bitLt):
                scales = weight.SCB if weight.SCB is not None else module.state.SCB
                yield name, functional.int8_vectorwise_dequant(weight.data, scales).float()
