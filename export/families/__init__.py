"""Model families, chosen by ``config.json``: each reads one and declares an architecture.

A new one is a file here, its model types and keys in ``known_keys.py``, and its class in :data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from embedge.export.families.base import Family
from embedge.export.families.bert import Bert, DistilBert, MPNet
from embedge.export.families.closest import check_no_variant, not_supported
from embedge.export.families.decoder import (
    EuroBert,
    Llama,
    LlamaBidirectional,
    Mistral,
    PplxQwen3,
    Qwen2,
    Qwen3,
    Voyage4,
)
from embedge.export.families.embedding_gemma2 import EmbeddingGemma2
from embedge.export.families.gemma3 import Gemma3
from embedge.export.families.gte import Gte
from embedge.export.families.jina_v3 import JinaV3, JinaV3Published
from embedge.export.families.jina_v5 import (
    JinaV5Nano,
    JinaV5NanoMerged,
    JinaV5Small,
    JinaV5SmallMerged,
)
from embedge.export.families.modernbert import ModernBert
from embedge.export.families.nomic_bert import NomicBert
from embedge.export.families.qwen2_5_vl import JinaV4, JinaV4Merged, Qwen25VL

__all__ = ["FAMILIES", "MERGED", "Family", "family_of"]

FAMILIES: tuple[type[Family], ...] = (
    JinaV4,  # before the family it is built on
    JinaV4Merged,
    Qwen25VL,
    Voyage4,
    JinaV5Nano,
    JinaV5Small,
    JinaV5NanoMerged,
    JinaV5SmallMerged,
    JinaV3Published,  # before XLM-RoBERTa, by whose type it goes
    JinaV3,
    Bert,
    MPNet,
    ModernBert,
    DistilBert,
    NomicBert,
    Gte,
    Llama,
    LlamaBidirectional,
    EuroBert,
    Mistral,
    Qwen2,
    Qwen3,
    PplxQwen3,
    Gemma3,
    EmbeddingGemma2,
)

# Those that serve a model of another family's model_type by its name.
MERGED: tuple[type[Family], ...] = (JinaV4Merged, JinaV5NanoMerged, JinaV5SmallMerged)


def family_of(
    config: Mapping[str, Any],
    name: str = "",
    tensors: Callable[[], Iterable[str]] = tuple,
    file: Path = Path("config.json"),
) -> type[Family]:
    """The first family that serves a model.

    Args:
        config: its config.json.
        name: its short name, by which pre-merged models are known.
        tensors: gives the names of its tensors, for the message.
        file: where its config.json lies, for the message.

    Raises:
        CheckpointError: no family serves it; the message names the closest one.
    """
    check_no_variant(config, file)
    for family in FAMILIES:
        if family.serves(config, name):
            return family
    raise not_supported(config, FAMILIES, tensors, file)
