"""torchao: 8-bit weights with 8-bit activations, and 4-bit weights, in bfloat16 and compiled.

Its authors advise ``torch.compile`` behind ``quantize_``: run as it is, each quantized product takes a
detour through Python. Compiling takes up to a minute for each model and needs a C++ compiler.
4 bits on a CPU are a prototype of theirs; its form with 8-bit activations needs a kernel
(``da8w4_linear_cpu``) that the wheels on PyPI have not.
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import numpy as np
import torch

from embedge.bench.peers.context import PeerContext
from embedge.bench.peers.hidden_state import HiddenStateSystem
from embedge.bench.peers.torch import runs_of, stored_bytes

__all__ = ["int4", "int8_dynamic"]

_GROUPS = (128, 64, 32)  # weights that share a scale at 4 bits; its default first


def int8_dynamic(context: PeerContext) -> HiddenStateSystem:
    """Return int8 weights a row, int8 activations a token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _system("torchao int8", Int8DynamicActivationInt8WeightConfig(), context)


def int4(context: PeerContext) -> HiddenStateSystem:
    """Return 4-bit weights in groups of 128, or the largest size that divides the width.

    Raises:
        ValueError: none does.
    """
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    width = context.config.hidden_size
    group = next((size for size in _GROUPS if width % size == 0), None)
    if group is None:
        raise ValueError(f"hidden_size {width}: expected a multiple of {_GROUPS[-1]}")
    return _system("torchao int4", PrototypeInt4WeightOnlyConfig(group_size=group), context)


def _system(name: str, config: Any, context: PeerContext) -> HiddenStateSystem:
    """Return the quantized and compiled model; it is run once, as that is when it is compiled."""
    from torchao.quantization import quantize_

    for logger in ("torchao", "torch._inductor", "torch._dynamo"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    model = copy.deepcopy(context.merged.backbone).to(torch.bfloat16)
    quantize_(model, config)
    size = stored_bytes(model, context)
    compiled = torch.compile(model, dynamic=True)
    run = runs_of(compiled)
    ids = np.ones((2, 8), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its tensors and the compiler's cache
        run(ids, np.ones_like(ids))
    return HiddenStateSystem(name, run, context, size)
