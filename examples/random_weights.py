"""Random weights for Qwen2.5-VL with outlier channels, a few rows at a time, in bfloat16.

Real language models carry a few residual channels that are many times larger than the others, each of
one sign. Here they begin in the token table and in the bias of the vision tower's merger, every layer
adds noise to them, and the norms in front of the Linears damp them, though not to the size of the
other channels. The vision tower has its own, from the patch embedding on, smaller and of both signs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jina_v4_layout import PROJECTOR, VISION, Size
from numpy.typing import NDArray

Floats = NDArray[np.float32]
CHUNK = 1 << 20  # values made at once: they stay in the cache until they are bfloat16
VISION_SIZES = (5.0, 20.0)  # of the smallest and the largest outlier channel, others being 1
OUTLIER_NOISE = 0.25  # of what varies in an outlier channel, relative to its size
OUTLIER_ENERGY = 0.4  # of the outlier channels behind a norm, relative to the others' energy


@dataclass(frozen=True)
class Channels:
    """Rows or columns that differ from the others: ``value * factor + shift``."""

    axis: int
    numbers: NDArray[np.int64]
    factors: Floats
    shifts: Floats


@dataclass(frozen=True)
class Values:
    """How the values of one tensor are drawn."""

    std: float
    mean: float = 0.0
    channels: Channels | None = None


class RandomWeights:
    """The values of all tensors of a checkpoint, each the same however much is asked for.

    Args:
        size: Widths and depths.
        seed: Of the random numbers.
    """

    def __init__(self, size: Size, seed: int) -> None:
        self.size, self.seed = size, seed
        generator = self._generator("outliers")
        count = size.outliers
        self.text_sizes = np.geomspace(*size.outlier_sizes, count).astype(np.float32)
        self.vision_sizes = np.geomspace(*VISION_SIZES, count).astype(np.float32)
        self.shifts = self.text_sizes * generator.choice(np.array([-1, 1], np.float32), count)
        self.text = np.sort(generator.choice(size.hidden, count, replace=False))
        self.vision = np.sort(generator.choice(size.vision_hidden, count, replace=False))

    def rows(self, name: str, shape: tuple[int, ...]) -> Iterator[Floats]:
        """Yield a base tensor's values in chunks of rows.

        Args:
            name: In the new prefix.
            shape: Of the whole tensor.

        Yields:
            float32 ``[rows, values per row]``, not yet rounded.
        """
        return self._draw(name, shape, self._values(name, shape))

    def adapter(self, module: str, task: str, part: str, shape: tuple[int, int]) -> Floats:
        """Return a LoRA matrix for scaling 1.

        Args:
            module: The adapted Linear's name, in the new prefix.
            task: A name; every task has other values.
            part: ``"A"`` or ``"B"``.
            shape: Of A ``(rank, in features)``, of B ``(out features, rank)``.

        Returns:
            float32, rounded to bfloat16.
        """
        if part == "A":
            std = self._gain(module, shape[1])
        else:
            std = self.size.adapter_strength * self._output(module) / math.sqrt(shape[1])
        chunks = self._draw(f"{module}.lora_{part}.{task}", shape, Values(std))
        return rounded(np.concatenate(list(chunks)))

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self.seed, zlib.crc32(name.encode())]))

    def _draw(self, name: str, shape: tuple[int, ...], values: Values) -> Iterator[Floats]:
        generator = self._generator(name)
        width = math.prod(shape[1:])
        step = max(1, CHUNK // width)
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            chunk = generator.standard_normal((rows, width), np.float32)
            chunk *= np.float32(values.std)
            if values.mean:
                chunk += np.float32(values.mean)
            if values.channels is not None:
                _change(chunk, start, values.channels)
            yield chunk

    def _values(self, name: str, shape: tuple[int, ...]) -> Values:
        module, _, parameter = name.rpartition(".")
        vision = module.startswith(VISION)
        outliers, sizes = (
            (self.vision, self.vision_sizes) if vision else (self.text, self.text_sizes)
        )
        if name.endswith("embed_tokens.weight"):
            noise = OUTLIER_NOISE * self.text_sizes
            return Values(1.0, channels=Channels(1, outliers, noise, self.shifts))
        if "norm" in module or module.endswith("ln_q"):
            width, count = shape[0], len(outliers)
            damping = math.sqrt(OUTLIER_ENERGY * (width - count) / count) / sizes
            if name.endswith("language_model.norm.weight"):
                damping *= 0.1  # else a mean over many tokens is little but what they all share
            return Values(0.2, 1.0, Channels(0, outliers, damping, 0 * damping))
        if parameter == "bias":
            return self._bias(module)
        std = self._output(module) * self._gain(module, math.prod(shape[1:]))
        if module.endswith("merger.mlp.2"):  # into the text's residual
            outliers, sizes, vision = self.text, self.text_sizes, False
        elif not module.endswith(("embed.proj", "o_proj", "down_proj", "attn.proj")):
            return Values(std)
        factors = sizes if vision else OUTLIER_NOISE * sizes
        return Values(std, channels=Channels(0, outliers, factors, 0 * sizes))

    def _bias(self, module: str) -> Values:
        if module.endswith("merger.mlp.2"):  # image rows have the outliers of the token table
            return Values(0.1, channels=Channels(0, self.text, 0 * self.shifts, self.shifts))
        if module.endswith("k_proj"):  # a few large values, as Qwen2.5 has them
            heads, width = self.size.kv_heads, self.size.head_dim
            shifts = np.full(heads, 6, np.float32)
            return Values(
                0.3, channels=Channels(0, np.arange(heads) * width + width // 4, 0 * shifts, shifts)
            )
        return Values(0.1 if module.startswith(VISION) else 0.3)

    def _gain(self, module: str, inputs: int) -> float:
        """The size of weights that make an output of size 1 from a module's usual input."""
        kind = module.rpartition(".")[2]
        if module.endswith(("o_proj", "attn.proj", "embed.proj")):
            return 1 / math.sqrt(inputs)
        if kind == "down_proj" or module.endswith("merger.mlp.2"):
            return 1 / (0.6 * math.sqrt(inputs))  # behind SiLU and a product, or GELU
        vision = module.startswith(VISION)
        width = self.size.vision_hidden if vision else self.size.hidden
        sizes = self.vision_sizes if vision else self.text_sizes
        share = (width - len(sizes) + float(np.sum(sizes**2))) / width  # that a norm divides by
        behind = 1 if module == PROJECTOR else 1 + OUTLIER_ENERGY
        return math.sqrt(share / (behind * inputs))

    def _output(self, module: str) -> float:
        """The size of a module's outputs, outliers apart."""
        kind = module.rpartition(".")[2]
        if kind in ("o_proj", "down_proj") or module.endswith("attn.proj"):
            vision = module.startswith(VISION)
            depth = self.size.vision_depth if vision else self.size.layers
            return 1 / math.sqrt(2 * depth)
        return {"q_proj": 1.4, "k_proj": 1.4, "qkv": 1.4, "gate_proj": 0.7, "up_proj": 0.7}.get(
            kind, 1
        )


def _change(chunk: Floats, start: int, channels: Channels) -> None:
    numbers, factors, shifts = channels.numbers, channels.factors, channels.shifts
    if channels.axis == 1:
        chunk[:, numbers] = chunk[:, numbers] * factors + shifts
        return
    for number, factor, shift in zip(numbers, factors, shifts, strict=True):
        if start <= number < start + len(chunk):
            chunk[number - start] = chunk[number - start] * factor + shift


def to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    """Return the bits of finite values as bfloat16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    halves = (bits >> np.uint32(16)) & np.uint32(1)
    halves += np.uint32(0x7FFF)
    halves += bits
    halves >>= np.uint32(16)
    return halves.astype(np.uint16)


def rounded(values: Floats) -> Floats:
    """Return values as bfloat16 has them, in float32."""
    wide = to_bfloat16(values).astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)
