"""Late interaction: models of one vector a token, and how they treat queries and documents.

sentence-transformers 6 saves its ``MultiVectorEncoder`` with everything in the files of modules::

    sentence_bert_config.json     query_length, document_length, query_expansion
    2_MultiVectorMask/            words whose tokens are left out, and of which texts

PyLate, whose layout it replaces, has Transformer and Dense alone, and the rest in
config_sentence_transformers.json: query_prefix, document_prefix, query_length, document_length,
do_query_expansion, attend_to_expansion_tokens, skiplist_words. Read as sentence-transformers 6 reads it:
prefixes are put before texts, the length of a query is what it is filled up to with mask tokens, punctuation
is left out of documents unless the file lists other words, and vectors have length 1.

Stanford's ColBERT, known by the class ``HF_ColBERT`` in config.json, has no modules: a Linear of tokens lies among the
transformer's own tensors, and artifact.metadata has markers, lengths and whether punctuation is left out.

Source: Khattab and Zaharia, "ColBERT", arXiv 2004.12832.
"""

from __future__ import annotations

import os
import string
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.export.source.config import words
from embedge.export.source.json_files import read_json_object, read_optional
from embedge.runtime.errors import EmbedgeWarning

__all__ = [
    "LATE_KEYS",
    "LINEAR",
    "METADATA",
    "STANFORD",
    "Expansion",
    "LateInteraction",
    "is_late",
    "is_stanford",
    "prefixed",
    "read_late",
    "read_stanford",
    "token_similarity",
]

STANFORD, METADATA, LINEAR = "HF_ColBERT", "artifact.metadata", "linear.weight"
LATE_KEYS = words("query_length document_length query_expansion")
_MODEL_TYPES = ("MultiVectorEncoder", "ColBERT")
_PREFIXES = {"query_prefix": "query", "document_prefix": "document"}
_PYLATE_KEYS = LATE_KEYS.union(
    _PREFIXES,
    words("do_query_expansion attend_to_expansion_tokens attend_to_mask_tokens skiplist_words"),
)
_EXPANSION_KEYS = words("strategy attend token length")
_MASK_KEYS = words("skiplist_words skiplist_tasks keep_only_token_ids")
_SIMILARITIES = {
    None: "maxsim",
    "maxsim": "maxsim",
    "MaxSim": "maxsim",  # PyLate's spelling
    "meanmaxsim": "meanmaxsim",
    "cosine": "maxsim",  # what a converted model had for single vectors
    "dot": "maxsim",
}
_ROLES = ("query", "document")
_CLASSIC_LENGTH = 32  # tokens of a query, where no file says


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """What queries are filled up with.

    Attributes:
        length: tokens of a filled query.
        fixed: whether longer ones are cut to that.
        attend: whether other tokens attend to the filling.
        token: what it is, ``None`` for the mask token, else the one that ends a text.
    """

    length: int
    fixed: bool = True
    attend: bool = False
    token: str | None = None


@dataclass(frozen=True, kw_only=True)
class LateInteraction:
    """How queries and documents become vectors of tokens.

    Attributes:
        query_length: most tokens of a query.
        document_length: most tokens of a document.
        text_length: most tokens of a text that is neither.
        expansion: what queries are filled up with, ``None`` for nothing.
        skipped_words: tokens whose vectors are left out.
        skipped_in: "query", "document": of which texts.
        markers: texts that the tokenizer has to give as one token, where it knows them.
        tensors: of the checkpoint, which are read as Dense layers.
    """

    query_length: int
    document_length: int
    text_length: int
    expansion: Expansion | None = None
    skipped_words: tuple[str, ...] = ()
    skipped_in: tuple[str, ...] = ("document",)
    markers: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """Most tokens of any text."""
        return max(self.query_length, self.document_length, self.text_length)

    @property
    def shortest(self) -> int:
        """The least of the most tokens of queries, documents and other texts."""
        return min(self.query_length, self.document_length, self.text_length)


def is_late(config: Mapping[str, Any], modules: Sequence[str]) -> bool:
    """Whether a model is one of late interaction.

    Args:
        config: its config_sentence_transformers.json.
        modules: full names of its modules.
    """
    kind = config.get("model_type")
    marked = kind is None and any(key in config for key in _PREFIXES)
    return kind in _MODEL_TYPES or marked or any(name.startswith("pylate.") for name in modules)


def is_stanford(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of Stanford's ColBERT."""
    return STANFORD in (config.get("architectures") or ())


def read_stanford(file: Path, text_length: int) -> LateInteraction:
    """How Stanford's ColBERT treats queries and documents; ``markers`` are theirs, in this order.

    Source: sentence-transformers' ``MultiVectorEncoder._maybe_load_stanford_metadata``.

    Args:
        file: artifact.metadata, which may be missing.
        text_length: most tokens of a text by the other files.

    Raises:
        CheckpointError: the file is damaged, or a setting is of another type.

    Warns:
        EmbedgeWarning: the file is missing, whose defaults are taken.
    """
    metadata = read_optional(file)
    if not os.path.lexists(file):
        warnings.warn(
            f"{file}: expected what a ColBERT of Stanford was trained with, found no such file; its defaults are "
            f"taken, as sentence-transformers does: queries of {_CLASSIC_LENGTH} tokens, the markers [unused0] and "
            "[unused1], no vectors of punctuation in documents. Fetch the file where the model has others",
            EmbedgeWarning,
            stacklevel=6,
        )
    markers = []
    for key, default in (("query_token_id", "[unused0]"), ("doc_token_id", "[unused1]")):
        marker = metadata.get(key) or default
        if not isinstance(marker, str):
            raise CheckpointError(f"{file}: {key} is {marker!r}, expected a token's text")
        markers.append(f"{marker} ")
    for key in ("attend_to_mask_tokens", "mask_punctuation"):
        if metadata.get(key) not in (None, True, False):
            raise CheckpointError(f"{file}: {key} is {metadata[key]!r}, expected true or false")
    length = _length(metadata.get("query_maxlen"), "query_maxlen", file) or _CLASSIC_LENGTH
    return LateInteraction(
        query_length=length,
        document_length=_length(metadata.get("doc_maxlen"), "doc_maxlen", file) or text_length,
        text_length=text_length,
        expansion=Expansion(length=length, attend=bool(metadata.get("attend_to_mask_tokens"))),
        skipped_words=tuple(string.punctuation) if metadata.get("mask_punctuation", True) else (),
        markers=tuple(markers),
        tensors=(LINEAR,),
    )


def token_similarity(name: object, file: Path) -> str:
    """How multi-vectors are compared: "maxsim", or "meanmaxsim", its mean over a query's tokens."""
    found = _SIMILARITIES.get(name) if isinstance(name, str | None) else None
    if found is None:
        raise CheckpointError(
            f"{file}: the similarity {name!r} is not supported; supported of a late-interaction model are "
            "maxsim and meanmaxsim"
        )
    return found


def prefixed(prompts: Mapping[str, str], config: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Prompts of queries and documents with PyLate's prefixes before them; without any, empty ones.

    Args:
        prompts: by name.
        config: config_sentence_transformers.json.
        file: that, for messages.

    Raises:
        CheckpointError: a prefix is no text.
    """
    found = {role: prompts.get(role, "") for role in _ROLES} | dict(prompts)
    for key, role in _PREFIXES.items():
        prefix = config.get(key) or ""
        if not isinstance(prefix, str):
            raise CheckpointError(f"{file}: {key} is {prefix!r}, expected a text")
        found[role] = prefix + found[role].removeprefix(prefix)
    return found


def read_late(
    config_file: Path,
    transformer_file: Path,
    transformer: Mapping[str, Any],
    mask: Path | None,
    text_length: int,
) -> LateInteraction:
    """How a late-interaction model treats queries and documents.

    Args:
        config_file: config_sentence_transformers.json.
        transformer_file: sentence_bert_config.json.
        transformer: its content.
        mask: the folder of ``MultiVectorMask``, ``None`` where PyLate's files have none.
        text_length: most tokens of a text by the other files.

    Raises:
        CheckpointError: naming what is not supported, or contradicts itself.
    """
    config = read_optional(config_file)
    flat = _flat_settings(config, config_file)
    origin = {key: transformer_file if key in transformer else config_file for key in LATE_KEYS}
    settings = {key: transformer.get(key, flat.get(key)) for key in LATE_KEYS}
    lengths = {
        key: _length(settings[key], key, origin[key]) for key in LATE_KEYS - {"query_expansion"}
    }
    expansion = _expansion(settings["query_expansion"], origin["query_expansion"])
    if expansion is not None and mask is None and config.get("model_type") == _MODEL_TYPES[0]:
        raise CheckpointError(
            f"{origin['query_expansion']}: query_expansion is set, and modules.json has no MultiVectorMask, "
            "without which sentence-transformers does not score what queries are filled up with; add the module, "
            "or delete query_expansion"
        )
    asked = lengths["query_length"]
    if expansion is not None and asked is not None and asked < expansion.length:
        raise CheckpointError(
            f"{origin['query_length']}: query_length is {asked}, expected at least the length that "
            f"query_expansion fills queries up to, {expansion.length}; correct one of them"
        )
    query_length = asked or text_length
    if expansion is not None:
        query_length = expansion.length if expansion.fixed else max(query_length, expansion.length)
    return LateInteraction(
        query_length=query_length,
        document_length=lengths["document_length"] or text_length,
        text_length=text_length,
        expansion=expansion,
        **(_mask(mask / "config.json") if mask else _pylate_mask(config, config_file)),
        markers=tuple(config[key] for key in _PREFIXES if config.get(key)),
    )


def _flat_settings(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """PyLate's settings under the names that sentence-transformers 6 has for them."""
    for key in ("do_query_expansion", "attend_to_expansion_tokens", "attend_to_mask_tokens"):
        if config.get(key) not in (None, True, False):
            raise CheckpointError(f"{file}: {key} is {config[key]!r}, expected true or false")
    flat = {key: config[key] for key in LATE_KEYS if config.get(key) is not None}
    marked = any(key in config for key in _PYLATE_KEYS)
    if not marked or "query_expansion" in config or config.get("do_query_expansion") is False:
        return flat
    attend = config.get("attend_to_expansion_tokens", config.get("attend_to_mask_tokens"))
    length = flat.pop("query_length", None) or _CLASSIC_LENGTH
    flat["query_expansion"] = {"strategy": "fixed", "attend": bool(attend), "length": length}
    return flat


def _length(value: object, key: str, file: Path) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise CheckpointError(f"{file}: {key} is {value!r}, expected a positive whole number")
    return value if isinstance(value, int) else None


def _expansion(value: object, file: Path) -> Expansion | None:
    if value is None:
        return None
    where = f"{file}: query_expansion"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is {value!r}, expected an object or null")
    if unknown := sorted(set(value) - _EXPANSION_KEYS):
        raise CheckpointError(
            f"{where} has {', '.join(unknown)}, expected only {', '.join(sorted(_EXPANSION_KEYS))}"
        )
    strategy, attend, token = value.get("strategy"), value.get("attend", False), value.get("token")
    if strategy not in ("fixed", "min"):
        raise CheckpointError(f"{where} has strategy={strategy!r}, expected 'fixed' or 'min'")
    if not isinstance(attend, bool):
        raise CheckpointError(f"{where} has attend={attend!r}, expected true or false")
    if not isinstance(token, str | None):
        raise CheckpointError(f"{where} has token={token!r}, expected a token's text or null")
    length = _length(value.get("length"), "length of query_expansion", file)
    if length is None:
        raise CheckpointError(
            f"{where} has no length, expected how many tokens a query is filled up to"
        )
    return Expansion(length=length, fixed=strategy == "fixed", attend=attend, token=token)


def _words(value: object, key: str, file: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise CheckpointError(f"{file}: {key} is {value!r}, expected a list of texts")
    return tuple(value)


def _mask(file: Path) -> dict[str, Any]:
    """What ``MultiVectorMask`` leaves out."""
    config = read_json_object(file)
    if unknown := sorted(set(config) - _MASK_KEYS):
        raise CheckpointError(
            f"{file}: MultiVectorMask has settings that are not supported: {', '.join(unknown)}"
        )
    if config.get("keep_only_token_ids"):
        raise CheckpointError(
            f"{file}: keep_only_token_ids is {config['keep_only_token_ids']!r}, expected null: vectors of "
            "image tokens alone are not supported"
        )
    tasks = config.get("skiplist_tasks")
    tasks = [tasks] if isinstance(tasks, str) else ["document"] if tasks is None else tasks
    skipped_in = _words(tasks, "skiplist_tasks", file)
    if other := [task for task in skipped_in if task not in _ROLES]:
        raise CheckpointError(
            f"{file}: skiplist_tasks has {other[0]!r}, expected only {' and '.join(_ROLES)}"
        )
    skipped = _words(config.get("skiplist_words") or [], "skiplist_words", file)
    return {"skipped_words": skipped, "skipped_in": skipped_in}


def _pylate_mask(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    listed = config.get("skiplist_words")
    if listed is None:
        marked = config.get("model_type") == "ColBERT" or any(key in config for key in _PREFIXES)
        listed = list(string.punctuation) if marked else []
    return {"skipped_words": _words(listed, "skiplist_words", file)}
