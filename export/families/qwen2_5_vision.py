"""The vision tower of Qwen2.5-VL: patches of images to features in the language tower's space.

Most blocks attend within windows of 8 × 8 patches; the patches are laid out window by window for
them, so that a window costs what a window costs. The others attend to the whole image. Everything
that depends on an image's size is an input, computed by the runtime (``runtime/_image_layout.py``).

Source: Bai et al., arXiv 2502.13923, section 2.1.1; ``Qwen2_5_VisionTransformerPretrainedModel`` of
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import TensorProto

from embedge.export.errors import CheckpointError
from embedge.export.graph.attention import attention
from embedge.export.graph.builder import Graph
from embedge.export.graph.rotary import rotate
from embedge.export.graph.scheme import Scheme
from embedge.export.graph.values import LinearRef, ScaleSink, Value
from embedge.export.source.config import ConfigReader, Shape
from embedge.export.weights.rotated import ResidualStream
from embedge.export.weights.tensors import Weights

OUTPUT = "image_features"
_IMAGE_AXES = ["images", "patches"]


class Qwen25Vision(ConfigReader):
    """One ``vision_config``.

    Args:
        config: the model's config.json.
        text_width: width of the language tower.

    Raises:
        CheckpointError: the configuration is not one this tower implements.
    """

    def __init__(self, config: Mapping[str, Any], text_width: int) -> None:
        vision = config.get("vision_config")
        if not isinstance(vision, dict):
            raise CheckpointError(
                "config.json: expected a vision_config, found none; export the language tower alone "
                "with modality='text' (--modality text)"
            )
        self.config = {"model_type": "qwen2_5_vl vision", **vision}
        self.width = self._int("hidden_size")
        self.depth = self._int("depth")
        self.heads = self._int("num_heads")
        self._divides(self.heads, self.width, "num_heads and hidden_size")
        self.inner = self._int("intermediate_size")
        self.activation = self._activation("hidden_act", "silu")
        self.epsilon = 1e-6  # fixed in the model's code
        self.channels = self._int("in_channels", self._int("in_chans", 3))
        self.patch = self._int("patch_size")
        self.temporal = self._int("temporal_patch_size", 2)
        self.merge = self._int("spatial_merge_size", 2)
        self.window = self._int("window_size")
        full = self.config.get("fullatt_block_indexes")
        if not isinstance(full, list) or not all(type(i) is int for i in full):
            raise self._unsupported("fullatt_block_indexes", full, "a list of block numbers")
        self.full_blocks = frozenset(full)
        self.out_width = self._int("out_hidden_size", text_width)
        if self.out_width != text_width:
            raise self._unsupported("out_hidden_size", self.out_width, f"hidden_size {text_width}")
        if self.channels != 3:
            raise self._unsupported("in_channels", self.channels, "3")

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    def image_settings(self) -> dict[str, Any]:
        """The tower's part of the manifest's ``model.image``."""
        return {
            "patch_size": self.patch,
            "temporal_patch_size": self.temporal,
            "merge_size": self.merge,
            "window_size": self.window,
            "rotary_dim": self.head_size // 2,
            "rotary_theta": 10000.0,  # fixed in the model's code
            "hidden_size": self.out_width,
        }

    def shapes(self) -> dict[str, Shape]:
        width, group = self.width, self.merge**2 * self.width
        return {
            "patch_embed.proj": (width, self.channels, self.temporal, self.patch, self.patch),
            **dict.fromkeys(("norm1", "norm2", "ln_q"), (width,)),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            **dict.fromkeys(("gate_proj", "up_proj"), (self.inner, width)),
            "down_proj": (width, self.inner),
            "merger.mlp.0": (group, group),
            "merger.mlp.2": (self.out_width, group),
        }

    def streams(self) -> tuple[ResidualStream, ...]:
        """The tower's own residual stream."""
        readers, writers = {}, ["visual.patch_embed.proj"]
        for index in range(self.depth):
            p = f"visual.blocks.{index}."
            readers[f"{p}attn.qkv"] = f"{p}norm1.weight"
            readers |= {f"{p}mlp.{n}_proj": f"{p}norm2.weight" for n in ("gate", "up")}
            writers += [f"{p}attn.proj", f"{p}mlp.down_proj"]
        readers["visual.merger.mlp.0"] = "visual.merger.ln_q.weight"
        return (ResidualStream(width=self.width, writers=writers, readers=readers),)

    def graph(self, weights: Weights, scheme: Scheme) -> Graph:
        """Write the graph from patches to ``image_features``, see ``ARCHITECTURE.md`` for its inputs."""
        g = Graph(weights=weights, scheme=scheme)
        row = self.channels * self.temporal * self.patch**2
        half = self.head_size // 2
        g.input("pixel_values", TensorProto.FLOAT, [*_IMAGE_AXES, row])
        g.input("rotary_cos", TensorProto.FLOAT, [*_IMAGE_AXES, half])
        g.input("rotary_sin", TensorProto.FLOAT, [*_IMAGE_AXES, half])
        g.input("window_index", TensorProto.INT64, ["windows", "window_patches"])
        g.input("window_lengths", TensorProto.INT64, ["windows"])
        g.input("window_restore", TensorProto.INT64, ["image_patches"])
        context = {
            "cos": "rotary_cos",
            "sin": "rotary_sin",
            "window.cos": self._by_window(g, "rotary_cos", half),
            "window.sin": self._by_window(g, "rotary_sin", half),
        }
        hidden = self._patches(g, row)
        for index in range(self.depth):
            hidden = self._block(g, context, index, hidden)
        features = self._merged(g, hidden)
        axes: list[int | str] = ["images", "features", self.out_width]
        g.output(features, OUTPUT, TensorProto.FLOAT, axes)
        g.prune()
        return g

    # -- pieces -------------------------------------------------------------------------------------

    def _patches(self, g: Graph, row: int) -> Value:
        """Patch embedding: a convolution whose stride is its kernel, so one product, in float32."""
        name = "visual.patch_embed.proj.weight"
        matrix = g.computed(
            "visual.patch_embed.matrix",
            (row, self.width),
            lambda: np.ascontiguousarray(g.weights.read(name).reshape(self.width, row).T),
            name,
        )
        return g.op("MatMul", "pixel_values", matrix)

    def _block(self, g: Graph, context: dict[str, str], index: int, hidden: Value) -> Value:
        p = f"visual.blocks.{index}."
        windowed = index not in self.full_blocks
        prefix = "window." if windowed else ""
        x = self._by_window(g, hidden, self.width) if windowed else hidden
        x = g.norm(x, f"{p}norm1.weight", None, self.epsilon, rms=True)
        query, key, value = (
            LinearRef(f"{p}attn.qkv", i * self.width, (i + 1) * self.width) for i in range(3)
        )
        q, k, v = g.linears(x, [query, key, value], rows=prefix)
        cos, sin = context[f"{prefix}cos"], context[f"{prefix}sin"]
        mixed = attention(
            g,
            self._rotate(g, g.add(q, g.bias(q)), cos, sin),
            self._rotate(g, g.add(k, g.bias(k)), cos, sin),
            v,
            heads=self.heads,
            kv_heads=self.heads,
            scale=self.head_size**-0.5,
            lengths="window_lengths" if windowed else None,
        )
        if windowed:
            flat = g.op("Reshape", mixed, g.const([-1, self.width], "int64"))
            rows = g.op("Gather", flat, "window_restore")
            mixed = g.op("Reshape", rows, g.op("Shape", hidden))
        out = LinearRef(f"{p}attn.proj")
        [y] = g.linears(mixed, [out], sink=ScaleSink(linear=value))
        x, hidden = g.add_norm(
            y,
            hidden,
            f"{p}norm2.weight",
            None,
            self.epsilon,
            rms=True,
            linear_bias=g.bias(y, upstream=v),
        )
        gate, up, down = (LinearRef(f"{p}mlp.{n}_proj") for n in ("gate", "up", "down"))
        y = g.gated(x, gate, up, self.activation)
        [y] = g.linears(y, [down])
        return g.add(g.add(y, g.bias(y)), hidden)

    def _merged(self, g: Graph, hidden: Value) -> Value:
        """Groups of ``merge × merge`` patches, which follow each other, to one feature each."""
        x = g.norm(hidden, "visual.merger.ln_q.weight", None, self.epsilon, rms=True)
        group = self.merge**2 * self.width
        x = g.op("Reshape", x, g.const([0, -1, group], "int64"))
        first, second = LinearRef("visual.merger.mlp.0"), LinearRef("visual.merger.mlp.2")
        [y] = g.linears(x, [first], rows="merged")
        y = g.activation(y, "gelu")
        [y] = g.linears(y, [second], rows="merged")
        return g.add(y, g.bias(y))

    def _by_window(self, g: Graph, x: str, width: int) -> Value:
        """``[images, patches, width]`` as ``[windows, window_patches, width]``."""
        rows = g.op("Reshape", x, g.const([-1, width], "int64"))
        return g.op("Gather", rows, "window_index")

    def _rotate(self, g: Graph, x: str, cos: str, sin: str) -> Value:
        return rotate(g, x, cos, sin, None, self.heads)
