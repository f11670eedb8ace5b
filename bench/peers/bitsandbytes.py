"""bitsandbytes: LLM.int8 and NF4, through transformers and in bfloat16, as its authors advise.

LLM.int8 multiplies in 8 bits what is below 6 in magnitude, and the columns of the inputs that are not
in floats; NF4 stores 4 bits in blocks of 64 and multiplies in bfloat16.

Sources: Dettmers et al., arXiv 2208.07339 and 2305.14314; "Quantize models" of its documentation.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch

from embedge.bench.peers.context import PeerContext
from embedge.bench.peers.hidden_state import HiddenStateSystem
from embedge.bench.peers.torch import runs_of, stored_bytes

__all__ = ["int8", "nf4"]

_NO_KERNEL = (
    "without its 4-bit product for this processor, which the package kernels downloads from the hub"
)


def int8(context: PeerContext) -> HiddenStateSystem:
    """Return LLM.int8 with the threshold of 6 that is its default."""
    model = _load(context, load_in_8bit=True)
    size = stored_bytes(model, context)
    return HiddenStateSystem("bitsandbytes int8", runs_of(model), context, size)


def nf4(context: PeerContext) -> HiddenStateSystem:
    """Return NF4, the type for normally distributed weights."""
    model = _load(
        context,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    size = stored_bytes(model, context)  # before the first run, which may pack the weights
    caveat = None if find_spec("kernels") else _NO_KERNEL
    return HiddenStateSystem("bitsandbytes nf4", runs_of(model), context, size, caveat)


def _load(context: PeerContext, **settings: Any) -> Any:
    """Return the merged model, quantized while transformers loads it."""
    from transformers import AutoModel, BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    folder = context.workdir / "merged"
    if not folder.exists():
        context.merged.backbone.save_pretrained(folder)
    make: Any = BitsAndBytesConfig  # untyped
    model = AutoModel.from_pretrained(
        folder, quantization_config=make(**settings), dtype=torch.bfloat16, device_map="cpu"
    )
    return model.eval()
