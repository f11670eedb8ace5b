"""Qwen2.5-VL used as an embedder of texts and images, and jina-embeddings-v4, which is built on it.

The language tower is a Qwen2 decoder with three position axes (time, row, column): every frequency
takes its angle from one of them, by ``mrope_section``. Image features from the vision tower
(``qwen2_5_vision.py``) take the places of the image tokens.

Source: Bai et al., arXiv 2502.13923; Günther et al., arXiv 2506.18902; transformers' ``Qwen2_5_VLModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from embedge.export.families.base import flat_config
from embedge.export.families.decoder import Qwen2
from embedge.export.families.qwen2_5_vision import FEATURE_WRITER, Qwen25Vision
from embedge.export.graph.architecture import Architecture
from embedge.export.graph.rotary import Rope
from embedge.export.source.json_files import read_optional
from embedge.export.source.sentence_transformers import SentenceSettings

_MERGED = "jina-embeddings-v4-vllm-"
_ENCODE_TEXT_TOKENS = 32768
_MATRYOSHKA = (128, 256, 512, 1024, 2048)


class Qwen25VL(Qwen2):
    """The language tower, whose architecture has the inputs for images where they are asked for."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl", "qwen2_5_vl_text")
    examples: ClassVar[Mapping[str, str]] = dict.fromkeys(
        model_types, "Qwen/Qwen2.5-VL-3B-Instruct"
    )
    roots = (*Qwen2.roots, "visual")
    ignored = (*Qwen2.ignored, Qwen25Vision.prefix)
    pooling_hint = (
        "If it is one task of jina-embeddings-v4, merged, name its folder as it is published: "
        "jina-embeddings-v4-vllm-TASK"
    )
    default_theta = 1e6
    tower = Qwen25Vision

    @classmethod
    def guessed_pooling(cls, config: Mapping[str, Any]) -> str:
        return "mean"

    def declare(self) -> Architecture:
        # the tower's last Linear writes the stream too: its features take the places of tokens
        return replace(super().declare(), feature_writer=FEATURE_WRITER)

    def read_rope(self, head_size: int) -> Rope:
        rope, half = super().read_rope(head_size), head_size // 2
        sections = rope.scaling.get("mrope_section", [half])
        kind = rope.scaling.get("rope_type", rope.scaling.get("type", "default"))
        if kind not in ("default", "mrope"):
            raise self.unsupported("rope_scaling type", kind, "'default' or 'mrope'")
        whole = isinstance(sections, list) and all(type(s) is int and s > 0 for s in sections)
        if not whole or sum(sections) != half or len(sections) not in (1, 3):
            expected = f"three positive numbers with the sum {half}, half of a head"
            raise self.unsupported("mrope_section", sections, expected)
        return replace(rope, sections=tuple(sections))


class JinaV4Merged(Qwen25VL):
    """One task of jina-embeddings-v4 as published for vLLM: the adapter merged, no multi-vector head."""

    model_types = ("jina_embeddings_v4_merged",)
    examples: ClassVar = {"jina_embeddings_v4_merged": "jinaai/jina-embeddings-v4-vllm-retrieval"}

    def multi_vector_dim(self) -> None:
        return None

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
    examples: ClassVar = {"jina_embeddings_v4": "jinaai/jina-embeddings-v4"}

    def multi_vector_dim(self) -> int:
        return self.integer("multi_vector_projector_dim", 128)

    @classmethod
    def serves(cls, config: Mapping[str, Any], name: str) -> bool:
        return "JinaEmbeddingsV4Model" in (config.get("architectures") or ())

    def declare(self) -> Architecture:
        pooling = self.config.get("single_vector_pool_strategy", "mean")
        if pooling != "mean":
            raise self.unsupported("single_vector_pool_strategy", pooling, "'mean'")
        return super().declare()

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
