"""Qwen2.5-VL used as an embedder of texts and images, and jina-embeddings-v4, which is built on it.

The language tower is a Qwen2 decoder with three position axes (time, row, column): every frequency
takes its angle from one of them, by ``mrope_section``. Image features from the vision tower
(``_qwen2_5_vision.py``) take the places of the image tokens.

Source: Bai et al., arXiv 2502.13923; Günther et al., arXiv 2506.18902; transformers' ``Qwen2_5_VLModel``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from onnx import TensorProto

from embedge.export.families.base import Family, flat_config
from embedge.export.families.decoder import Decoder
from embedge.export.families.qwen2_5_vision import Qwen25Vision
from embedge.export.graph.builder import Graph
from embedge.export.graph.rotary import position_ids
from embedge.export.graph.values import Value
from embedge.export.source.json_files import read_optional
from embedge.export.source.sentence_transformers import SentenceSettings
from embedge.export.weights.rotated import ResidualStream

_MERGED = "jina-embeddings-v4-vllm-"
_ENCODE_TEXT_TOKENS = 32768
_MATRYOSHKA = (128, 256, 512, 1024, 2048)
_IMAGE_INPUTS = ("position_ids", "pool_mask", "image_features", "image_positions")


class Qwen25VL(Decoder):
    """The language tower alone, until :meth:`with_images` is asked for."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl", "qwen2_5_vl_text")
    roots = (*Decoder.roots, "visual")
    ignored = (*Decoder.ignored, "visual.")
    default_pooling = "mean"
    guess = (
        "If it is one task of jina-embeddings-v4, merged, name its folder as it is published: "
        "jina-embeddings-v4-vllm-TASK; otherwise give pooling= (--pooling)"
    )
    default_theta = 1e6
    tower = Qwen25Vision

    def __init__(self, config: Mapping[str, Any], max_length: int) -> None:
        super().__init__(config, max_length)
        self.images = False

    def check(self) -> None:
        super().check()
        half = self.head_size // 2
        sections = self.rope.get("mrope_section", [half])
        kind = self.rope.get("rope_type", self.rope.get("type", "default"))
        if kind not in ("default", "mrope"):
            raise self._unsupported("rope_scaling type", kind, "'default' or 'mrope'")
        whole = isinstance(sections, list) and all(type(s) is int and s > 0 for s in sections)
        if not whole or sum(sections) != half or len(sections) not in (1, 3):
            expected = f"three positive numbers with the sum {half}, half of a head"
            raise self._unsupported("mrope_section", sections, expected)
        self.sections = sections

    def with_images(self) -> Qwen25VL:
        """The same model with the inputs for images, see ``ARCHITECTURE.md``."""
        model = copy.copy(self)
        model.images = True
        model.inputs = (*Family.inputs, *_IMAGE_INPUTS)
        model.pool_mask = "pool_mask"
        return model

    def text_only(self) -> Qwen25VL:
        model = copy.copy(self)
        model.images = False
        model.inputs, model.pool_mask = Family.inputs, Family.pool_mask
        return model

    def streams(self) -> tuple[ResidualStream, ...]:
        """The tower's last Linear writes the stream too: its features take the places of tokens."""
        (stream,) = super().streams()
        return (replace(stream, writers=[*stream.writers, "visual.merger.mlp.2"]),)

    def declare_inputs(self, g: Graph) -> None:
        g.input("input_ids", TensorProto.INT64, ["batch", "tokens"])
        g.input("attention_mask", TensorProto.INT64, ["batch", "tokens"])
        if self.images:
            g.input("position_ids", TensorProto.INT64, [3, "batch", "tokens"])
            g.input("pool_mask", TensorProto.INT64, ["batch", "tokens"])
            g.input("image_features", TensorProto.FLOAT, ["image_tokens", self.hidden_size])
            g.input("image_positions", TensorProto.INT64, ["image_tokens", 2])

    def rotary(self, g: Graph, tokens: str) -> dict[str, str]:
        """Angles computed in float32 like transformers; tables for 128,000 positions would be 64 MB."""
        exponents = np.arange(0, self.head_size, 2, dtype=np.float64) / self.head_size
        frequencies = (1.0 / self.theta**exponents).astype(np.float32)
        if not self.images:
            steps = g.op("Range", g.const(0, "int64"), tokens, g.const(1, "int64"))
            column = g.op(
                "Cast", g.op("Unsqueeze", steps, g.const([1], "int64")), to=TensorProto.FLOAT
            )
            angles = g.op("Mul", column, g.const(frequencies))
            tables = {"cos": g.op("Cos", angles), "sin": g.op("Sin", angles)}
            return {**tables, "positions": position_ids(g, tokens)}
        # one axis per frequency: [3, batch, tokens] → [batch, tokens, 3] → [batch, tokens, head / 2]
        positions = g.op("Cast", "position_ids", to=TensorProto.FLOAT)
        axes = np.repeat(np.arange(len(self.sections)), self.sections)
        last = g.op("Transpose", positions, perm=[1, 2, 0])
        chosen = g.op("Gather", last, g.const(axes, "int64"), axis=2)
        angles = g.op("Mul", chosen, g.const(frequencies))
        return {"cos": g.op("Cos", angles), "sin": g.op("Sin", angles)}

    def embed(self, g: Graph, context: dict[str, str]) -> Value:
        states = super().embed(g, context)
        if not self.images:
            return states
        return g.op("ScatterND", states, "image_positions", "image_features")


class JinaV4Merged(Qwen25VL):
    """One task of jina-embeddings-v4 as published for vLLM: the adapter merged, no multi-vector head."""

    model_types = ("jina_embeddings_v4_merged",)

    def check(self) -> None:
        super().check()
        self.multi_vector_dim = None

    @classmethod
    def serves(cls, config: Mapping[str, Any], name: str) -> bool:
        return name.lower().startswith(_MERGED) and config.get("model_type") == "qwen2_5_vl"

    @classmethod
    def own_settings(cls, config: Mapping[str, Any], folder: Path) -> SentenceSettings:
        return encode_settings(config, folder)

    @classmethod
    def own_tasks(cls, config: Mapping[str, Any], name: str) -> dict[str, str | None]:
        return {name.lower().removeprefix(_MERGED): None}


class JinaV4(Qwen25VL):
    """jina-embeddings-v4: prompts, pooling and the multi-vector head, without its remote code."""

    model_types = ("jina_embeddings_v4",)

    @classmethod
    def serves(cls, config: Mapping[str, Any], name: str) -> bool:
        return "JinaEmbeddingsV4Model" in (config.get("architectures") or ())

    def check(self) -> None:
        super().check()
        pooling = self.config.get("single_vector_pool_strategy", "mean")
        if pooling != "mean":
            raise self._unsupported("single_vector_pool_strategy", pooling, "'mean'")
        self.multi_vector_dim = self._int("multi_vector_projector_dim", 128)

    @classmethod
    def own_settings(cls, config: Mapping[str, Any], folder: Path) -> SentenceSettings:
        return encode_settings(config, folder)

    @classmethod
    def own_tasks(cls, config: Mapping[str, Any], name: str) -> dict[str, str | None]:
        names = config.get("task_names")
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            names = ["retrieval", "text-matching", "code"]
        return dict.fromkeys(names, "adapters")


def encode_settings(config: Mapping[str, Any], folder: Path) -> SentenceSettings:
    """The settings of the published ``encode_text``; its sentence-transformers files name remote code."""
    config = flat_config(config)
    declared = read_optional(folder / "tokenizer_config.json").get("model_max_length")
    limits = (_ENCODE_TEXT_TOKENS, declared, config.get("max_position_embeddings"))
    dims = config.get("matryoshka_dims") or _MATRYOSHKA
    return SentenceSettings(
        pooling="mean",
        normalize=True,
        prompts={"query": "Query: ", "passage": "Passage: "},
        task_prompts={"text-matching": {"query": "Query: ", "passage": "Query: "}},
        default_prompt_name="query",
        max_length=min(n for n in limits if type(n) is int and n > 0),
        matryoshka_dims=tuple(int(d) for d in dims if d <= config.get("hidden_size", max(dims))),
    )
