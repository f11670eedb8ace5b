"""The vision tower of Qwen2.5-VL: patches of images to features in the language tower's space.

Most blocks attend within windows of 8 × 8 patches; the patches are laid out window by window for
them, so that a window costs what a window costs. The others attend to the whole image. Everything
that depends on an image's size is an input, computed by the runtime (``runtime/images/layout.py``).

Source: Bai et al., arXiv 2502.13923, section 2.1.1; ``Qwen2_5_VisionTransformerPretrainedModel`` of
transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from onnx import TensorProto

from embedge.export.errors import CheckpointError
from embedge.export.families.base import Tower, check_biases
from embedge.export.graph.architecture import (
    Attention,
    Layer,
    Mlp,
    layer_shapes,
    residual_stream,
)
from embedge.export.graph.attention import Seen
from embedge.export.graph.block import Regrouped, block, normalized
from embedge.export.graph.builder import Graph
from embedge.export.graph.rotary import Rope, Rotary
from embedge.export.graph.scheme import Scheme
from embedge.export.graph.values import LinearRef, Value, rows_of
from embedge.export.source.config import Shape
from embedge.export.weights.rotated import ResidualStream
from embedge.export.weights.tensors import NormRef, Weights

OUTPUT = "image_features"
PATCHES = LinearRef("visual.patch_embed.proj", has_bias=False)
MERGED = LinearRef("visual.merger.mlp.0")
FEATURE_WRITER = LinearRef("visual.merger.mlp.2")
_ROTARY_THETA = 10000.0  # fixed in the model's code
_IMAGE_AXES = ["images", "patches"]
_WINDOWS = Regrouped(name="window.", index="window_index", restore="window_restore")


def _norm(name: str) -> NormRef:
    return NormRef(name=name, epsilon=1e-6, rms=True)  # fixed in the model's code


_MERGER_NORM = _norm("visual.merger.ln_q")


class Qwen25Vision(Tower):
    """One ``vision_config``.

    Args:
        config: the model's config.json.
        text_width: width of the language tower.

    Raises:
        CheckpointError: the configuration is not one this tower implements.
    """

    prefix = "visual."

    def __init__(self, config: Mapping[str, Any], text_width: int) -> None:
        vision = config.get("vision_config")
        if not isinstance(vision, dict):
            raise CheckpointError(
                "config.json: expected a vision_config, found none; export the language tower alone "
                "with modality='text' (--modality text)"
            )
        self.config = {"model_type": "qwen2_5_vl vision", **vision}
        self.width = self.integer("hidden_size")
        self.depth = self.integer("depth")
        self.heads = self.integer("num_heads")
        self.divides(self.heads, self.width, "num_heads and hidden_size")
        self.channels = self.integer("in_channels", self.integer("in_chans", 3))
        self.patch = self.integer("patch_size")
        self.temporal = self.integer("temporal_patch_size", 2)
        self.merge = self.integer("spatial_merge_size", 2)
        self.window = self.integer("window_size")
        full = self.config.get("fullatt_block_indexes")
        if not isinstance(full, list) or not all(type(i) is int for i in full):
            raise self.unsupported("fullatt_block_indexes", full, "a list of block numbers")
        self.full_blocks = frozenset(full)
        self.out_width = self.integer("out_hidden_size", text_width)
        if self.out_width != text_width:
            raise self.unsupported("out_hidden_size", self.out_width, f"hidden_size {text_width}")
        if self.channels != 3:
            raise self.unsupported("in_channels", self.channels, "3")
        self.layers = tuple(self._layer(f"visual.blocks.{i}.") for i in range(self.depth))

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    def _layer(self, p: str) -> Layer:
        attention = Attention(
            linears=rows_of(f"{p}attn.qkv", *[self.width] * 3),
            out=LinearRef(f"{p}attn.proj"),
            input_norm=_norm(f"{p}norm1"),
            heads=self.heads,
            kv_heads=self.heads,
            head_size=self.head_size,
            rope=Rope(head_size=self.head_size, theta=_ROTARY_THETA, scaling={}),
        )
        mlp = Mlp(
            linears=[LinearRef(f"{p}mlp.{n}_proj") for n in ("gate", "up")],
            out=LinearRef(f"{p}mlp.down_proj"),
            input_norm=_norm(f"{p}norm2"),
            inner=self.integer("intermediate_size"),
            activation=self.activation("hidden_act", "silu"),
        )
        return Layer(attention, mlp)

    def image_settings(self) -> dict[str, Any]:
        """The tower's part of the manifest's ``model.image``."""
        return {
            "patch_size": self.patch,
            "temporal_patch_size": self.temporal,
            "merge_size": self.merge,
            "window_size": self.window,
            "rotary_dim": self.head_size // 2,
            "rotary_theta": _ROTARY_THETA,
            "hidden_size": self.out_width,
        }

    def shapes(self) -> dict[str, Shape]:
        group = self.merge**2 * self.width
        patch = (self.channels, self.temporal, self.patch, self.patch)
        return {
            **layer_shapes(self.layers, self.width),
            PATCHES.name: (self.width, *patch),
            _MERGER_NORM.name: (self.width,),
            MERGED.name: (group, group),
            FEATURE_WRITER.name: (self.out_width, group),
        }

    def check_tensors(self, names: Iterable[str]) -> None:
        parts = [part for layer in self.layers for part in layer.sublayers]
        linears = [linear for part in parts for linear in (*part.linears, part.out)]
        check_biases((PATCHES, *linears, MERGED, FEATURE_WRITER), names, self.config)

    def streams(self) -> tuple[ResidualStream, ...]:
        """The tower's own residual stream."""
        readers = {MERGED: _MERGER_NORM}
        return (residual_stream(self.layers, self.width, writers=[PATCHES], readers=readers),)

    def graph(self, weights: Weights, scheme: Scheme) -> Graph:
        """Write the graph from patches to ``image_features``; its inputs: ``docs/reference/bundle-format.md``."""
        g = Graph(weights=weights, scheme=scheme)
        row = self.channels * self.temporal * self.patch**2
        half = self.head_size // 2
        g.input("pixel_values", TensorProto.FLOAT, [*_IMAGE_AXES, row])
        g.input("rotary_cos", TensorProto.FLOAT, [*_IMAGE_AXES, half])
        g.input("rotary_sin", TensorProto.FLOAT, [*_IMAGE_AXES, half])
        g.input("window_index", TensorProto.INT64, ["windows", "window_patches"])
        g.input("window_lengths", TensorProto.INT64, ["windows"])
        g.input("window_restore", TensorProto.INT64, ["image_patches"])
        whole = Rotary(cos="rotary_cos", sin="rotary_sin")
        apart = Rotary(
            cos=_WINDOWS.apart(g, whole.cos, half), sin=_WINDOWS.apart(g, whole.sin, half)
        )
        hidden = self._patches(g, row)
        for index, layer in enumerate(self.layers):
            if index in self.full_blocks:
                hidden = block(g, layer, hidden, Seen(), whole)
            else:
                hidden = block(g, layer, hidden, Seen(lengths="window_lengths"), apart, _WINDOWS)
        features = self._merged(g, hidden)
        axes: list[int | str] = ["images", "features", self.out_width]
        g.output(features, OUTPUT, TensorProto.FLOAT, axes)
        g.prune()
        return g

    # -- pieces -------------------------------------------------------------------------------------

    def _patches(self, g: Graph, row: int) -> Value:
        """Patch embedding: a convolution whose stride is its kernel, so one matmul, in float32."""
        name = f"{PATCHES.name}.weight"
        matrix = g.computed(
            "visual.patch_embed.matrix",
            (row, self.width),
            lambda: np.ascontiguousarray(g.weights.read(name).reshape(self.width, row).T),
            name,
        )
        return g.op("MatMul", "pixel_values", matrix)

    def _merged(self, g: Graph, hidden: Value) -> Value:
        """Groups of ``merge × merge`` patches, which follow each other, to one feature each."""
        x = normalized(g, hidden, _MERGER_NORM)
        group = self.merge**2 * self.width
        x = g.op("Reshape", x, g.const([0, -1, group], "int64"))
        [y] = g.linears(x, [MERGED], rows="merged")
        y = g.activation(y, "gelu")
        [y] = g.linears(y, [FEATURE_WRITER], rows="merged")
        return g.add(y, g.bias(y))
