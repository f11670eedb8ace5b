"""The types in which merged torch is measured beside a bundle."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from embedge.bench.errors import BenchArgumentError

__all__ = ["TORCH_TYPES", "choose_torch_types", "multiplies_bfloat16"]

TORCH_TYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}


def choose_torch_types(
    wanted: Sequence[str] | None, device: str, notes: list[str]
) -> tuple[str, ...]:
    """The types to measure.

    Args:
        wanted: names, ``("none",)``, or ``None``: those that the device multiplies.
        device: "cpu" or "cuda".
        notes: takes a sentence about what was left out.

    Raises:
        BenchArgumentError: a type that the device cannot be measured in.
    """
    known = TORCH_TYPES[device]
    if wanted is None:
        if device == "cuda" or multiplies_bfloat16():
            return known
        notes.append(
            "torch bf16 was left out: this processor has no products of bfloat16, so torch emulates them "
            "several times slower than fp32; --torch-types float32 bfloat16 measures it"
        )
        return ("float32",)
    if set(wanted) == {"none"}:
        return ()
    if unknown := [name for name in wanted if name not in known]:
        raise BenchArgumentError(
            f"--torch-types {' '.join(unknown)}: expected some of {', '.join(known)} on {device}, or none"
        )
    return tuple(name for name in known if name in wanted)


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself, by torch's list of what it can."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return any(has for name, has in capabilities().items() if name.endswith("bf16"))
