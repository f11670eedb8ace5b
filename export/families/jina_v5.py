"""jina-embeddings-v5-text: EuroBERT (nano) or Qwen3 (small) with a LoRA for each of four tasks.

The last token is the vector, of length 1; every text has a prompt, in all tasks. The published code (``custom_st.py``,
``modeling_jina_embeddings_v5.py``) says so and is never run.

Source: Akram et al., arXiv 2602.15547.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from embedge.export.errors import CheckpointError
from embedge.export.families.base import Family
from embedge.export.families.decoder import EuroBert, Qwen3
from embedge.export.source.sentence_transformers import SentenceSettings

_TASKS = ("retrieval", "text-matching", "clustering", "classification")
_MERGED = re.compile(rf"jina-embeddings-v5-text-(nano|small)-(?P<task>{'|'.join(_TASKS)})")
_PROMPTS = {"query": "Query: ", "document": "Document: "}
_MATRYOSHKA = (32, 64, 128, 256, 512, 768, 1024)


class _JinaV5(Family):
    """What both sizes share."""

    @classmethod
    def completed(cls, settings: SentenceSettings, config: Mapping[str, Any]) -> SentenceSettings:
        if settings.pooling is None:  # no modules.json: as the published encode() does it
            settings = replace(settings, pooling="lasttoken", normalize=True)
            if not settings.prompts:
                settings = replace(settings, prompts=dict(_PROMPTS), default_prompt_name="document")
        width = config.get("hidden_size")
        sizes = tuple(n for n in _MATRYOSHKA if not isinstance(width, int) or n <= width)
        return replace(settings, matryoshka_dims=settings.matryoshka_dims or sizes)


class _WithAdapters(_JinaV5):
    """All tasks, an adapter for each, whatever the model's folder is called."""

    @classmethod
    def own_tasks(cls, config: Mapping[str, Any], name: str) -> dict[str, str | None]:
        names = config.get("task_names")
        if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            raise CheckpointError(
                f"config.json: task_names is {names!r}, expected a list of names, each of a folder in adapters/"
            )
        return {task: f"adapters/{task}" for task in names}


class _Merged(_JinaV5):
    """One task, which the model's name says."""

    @classmethod
    def own_tasks(cls, config: Mapping[str, Any], name: str) -> dict[str, str | None]:
        merged = _MERGED.fullmatch(name.lower())
        return {merged["task"]: None} if merged else {}


class JinaV5Nano(_WithAdapters, EuroBert):
    """jina-embeddings-v5-text-nano: EuroBERT with an adapter for each task."""

    model_types = ("jina_embeddings_v5",)
    examples: ClassVar = {"jina_embeddings_v5": "jinaai/jina-embeddings-v5-text-nano"}

    @classmethod
    def serves(cls, config: Mapping[str, Any], name: str) -> bool:
        return super().serves(config, name) and config.get("is_decoder") is False


class JinaV5Small(_WithAdapters, Qwen3):
    """jina-embeddings-v5-text-small: Qwen3 with an adapter for each task."""

    model_types = ("jina_embeddings_v5",)
    examples: ClassVar = {"jina_embeddings_v5": "jinaai/jina-embeddings-v5-text-small"}

    @classmethod
    def kind(cls, config: Mapping[str, Any]) -> str:
        return "jina_embeddings_v5_small"


class JinaV5NanoMerged(_Merged, EuroBert):
    """One task of jina-embeddings-v5-text-nano, the adapter merged, as it is published."""

    model_types = ("jina_embeddings_v5_nano_merged",)
    examples: ClassVar = {
        "jina_embeddings_v5_nano_merged": "jinaai/jina-embeddings-v5-text-nano-retrieval"
    }

    @classmethod
    def serves(cls, config: Mapping[str, Any], name: str) -> bool:
        return _is_merged(config, name, "eurobert")


class JinaV5SmallMerged(_Merged, Qwen3):
    """One task of jina-embeddings-v5-text-small, the adapter merged, as it is published."""

    model_types = ("jina_embeddings_v5_small_merged",)
    examples: ClassVar = {
        "jina_embeddings_v5_small_merged": "jinaai/jina-embeddings-v5-text-small-retrieval"
    }

    @classmethod
    def serves(cls, config: Mapping[str, Any], name: str) -> bool:
        return _is_merged(config, name, "qwen3")


def _is_merged(config: Mapping[str, Any], name: str, model_type: str) -> bool:
    return config.get("model_type") == model_type and bool(_MERGED.fullmatch(name.lower()))
