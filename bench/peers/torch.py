"""Torch's own dynamic int8, and what every peer that is a torch module shares."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embedge.bench.peers.context import PeerContext
from embedge.bench.peers.hidden_state import HiddenStateSystem, Run
from embedge.bench.systems.tokens import Ids

__all__ = ["dynamic_int8", "runs_of", "stored_bytes"]


def runs_of(model: Any) -> Run:
    """Return what runs a module, in any float type, that gives ``last_hidden_state``."""

    def run(ids: Ids, mask: Ids) -> NDArray[np.float32]:
        with torch.inference_mode():
            output = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        hidden: NDArray[np.float32] = output.last_hidden_state.float().numpy()
        return hidden

    return run


def stored_bytes(model: Any, context: PeerContext) -> int:
    """Return the size of the file that ``torch.save`` makes of a module's weights."""
    file = context.workdir / "weights.pt"
    torch.save(model.state_dict(), file)
    size = file.stat().st_size
    file.unlink()
    return size


def dynamic_int8(context: PeerContext) -> HiddenStateSystem:
    """Return ``torch.ao.quantization.quantize_dynamic`` of every Linear.

    8-bit weights a tensor, activations quantized as they come.
    """
    from torch.ao import quantization

    quantize: Any = quantization.quantize_dynamic  # it has no annotations
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is deprecated
        model = quantize(context.merged.backbone, {torch.nn.Linear}, dtype=torch.qint8)
    size = stored_bytes(model, context)
    return HiddenStateSystem("torch dynamic int8", runs_of(model), context, size)
