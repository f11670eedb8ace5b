"""Torch's own dynamic int8: 8-bit weights a tensor, activations quantized as they come."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embedge.bench._tokens import Ids
from embedge.bench.peers._context import PeerContext
from embedge.bench.peers._hidden_state import HiddenStateSystem

__all__ = ["dynamic_int8"]


class _TorchInt8System(HiddenStateSystem):
    def __init__(self, model: Any, context: PeerContext, size: int) -> None:
        super().__init__("torch dynamic int8", context.source, context.tokens, size)
        self._model = model

    def forward(self, ids: Ids, mask: Ids) -> NDArray[np.float32]:
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)
            )
        hidden: NDArray[np.float32] = output.last_hidden_state.numpy()
        return hidden


def dynamic_int8(context: PeerContext) -> HiddenStateSystem:
    """Return ``torch.ao.quantization.quantize_dynamic`` of every Linear."""
    from torch.ao import quantization

    quantize: Any = quantization.quantize_dynamic  # it has no annotations
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is deprecated
        model = quantize(context.merged.backbone, {torch.nn.Linear}, dtype=torch.qint8)
    file = context.workdir / "torch-int8.pt"
    torch.save(model.state_dict(), file)
    size = file.stat().st_size
    file.unlink()
    return _TorchInt8System(model, context, size)
