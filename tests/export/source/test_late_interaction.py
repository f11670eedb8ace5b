"""What files say of late interaction is used or refused by name."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest

from embedge.export import CheckpointError
from embedge.export.source.late_interaction import Expansion
from embedge.export.source.sentence_transformers import SentenceSettings, read_modules
from tests.helpers.sentence_files import CONFIG, write_dense, write_json

_BASE = "sentence_transformers.base.modules."
_MASK = "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"
_PYLATE = {"model_type": "ColBERT", "query_prefix": "[Q] ", "document_prefix": "[D] "}


def read(
    folder: Path,
    settings: dict[str, Any],
    *,
    transformer: dict[str, Any] | None = None,
    mask: dict[str, Any] | None = None,
    dense: dict[str, Any] | None = None,
    normalize: dict[str, Any] | None = None,
    modules: list[str] | None = None,
) -> SentenceSettings:
    """The settings of a folder with these files; without modules, PyLate's two."""
    listed = ["sentence_transformers.models.Transformer", "pylate.models.Dense.Dense"]
    listed = listed if modules is None else modules
    paths = ["", *(f"{i}_module" for i in range(1, len(listed)))]
    write_json(
        folder / "modules.json",
        [{"path": path, "type": name} for path, name in zip(paths, listed, strict=True)],
    )
    write_json(folder / "config_sentence_transformers.json", settings)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 48, **(transformer or {})})
    for path, name in zip(paths, listed, strict=True):
        if name.endswith(".Dense"):
            write_dense(folder / path, **(dense or {}))
        elif name.endswith(".MultiVectorMask"):
            write_json(folder / path / "config.json", mask or {})
        elif name.endswith(".Normalize"):
            given = {"module_input_name": "token_embeddings"} if normalize is None else normalize
            write_json(folder / path / "config.json", given)
    return read_modules(folder, CONFIG)


def native(folder: Path, **files: Any) -> SentenceSettings:
    """The same of sentence-transformers 6's layout."""
    kinds = [f"{_BASE}transformer.Transformer", f"{_BASE}dense.Dense", _MASK]
    modules = files.pop("modules", [*kinds, f"{_BASE}normalize.Normalize"])
    settings = {"model_type": "MultiVectorEncoder", **files.pop("settings", {})}
    return read(folder, settings, modules=modules, **files)


def test_pylates_defaults_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    settings = read(tmp_path, _PYLATE)
    late = settings.late
    assert late is not None
    assert settings.prompts == {"query": "[Q] ", "document": "[D] "}
    assert (settings.pooling, settings.normalize, settings.similarity) == (None, True, "maxsim")
    assert (late.query_length, late.document_length, late.text_length) == (32, 48, 48)
    assert late.expansion == Expansion(length=32)
    assert late.skipped_words == tuple(string.punctuation)
    assert late.skipped_in == ("document",)
    assert late.markers == ("[Q] ", "[D] ")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"query_length": 20}, (20, Expansion(length=20))),
        (
            {"query_length": 20, "attend_to_expansion_tokens": True},
            (20, Expansion(length=20, attend=True)),
        ),
        ({"attend_to_mask_tokens": True}, (32, Expansion(length=32, attend=True))),
        ({"do_query_expansion": False}, (48, None)),
        ({"do_query_expansion": False, "query_length": 20}, (20, None)),
        ({"query_expansion": None, "query_length": 20}, (20, None)),
        (
            {"query_expansion": {"strategy": "min", "length": 16, "token": "x"}},
            (48, Expansion(length=16, fixed=False, token="x")),
        ),
    ],
)
def test_pylates_flat_settings(settings: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    late = read(tmp_path, {**_PYLATE, **settings}).late
    assert late is not None
    assert (late.query_length, late.expansion) == expected


def test_a_prefix_stands_before_the_prompt_once(tmp_path: Path) -> None:
    prompts = {"query": "[Q] find: ", "document": "text: ", "other": "o"}
    settings = read(tmp_path, {**_PYLATE, "prompts": prompts})
    assert settings.prompts == {"query": "[Q] find: ", "document": "[D] text: ", "other": "o"}


@pytest.mark.parametrize("key", ["query_prefix", "document_prefix"])
def test_a_folder_without_a_model_type_is_known_by_its_prefixes(key: str, tmp_path: Path) -> None:
    assert read(tmp_path, {key: ""}).late is not None


def test_what_stands_in_the_modules_own_files_wins(tmp_path: Path) -> None:
    late = native(
        tmp_path,
        settings={"query_length": 9, "document_length": 9},
        transformer={"query_length": 21, "document_length": None, "query_expansion": None},
        mask={"skiplist_words": ["."], "skiplist_tasks": "query"},
    ).late
    assert late is not None
    assert (late.query_length, late.document_length, late.expansion) == (21, 48, None)
    assert (late.skipped_words, late.skipped_in) == ((".",), ("query",))


_FILLED = {"strategy": "fixed", "length": 16}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "clusters of tokens": (
        {
            "modules": [
                f"{_BASE}transformer.Transformer",
                "sentence_transformers.x.HierarchicalTokenPooling",
            ]
        },
        "HierarchicalTokenPooling is not supported; supported are",
    ),
    "a pooling": (
        {"modules": [f"{_BASE}transformer.Transformer", "sentence_transformers.models.Pooling"]},
        "Pooling is not supported",
    ),
    "an order": (
        {"modules": [f"{_BASE}transformer.Transformer", _MASK, f"{_BASE}dense.Dense"]},
        "Transformer → MultiVectorMask → Dense are not supported in this order",
    ),
    "two masks": (
        {"modules": [f"{_BASE}transformer.Transformer", _MASK, _MASK]},
        "MultiVectorMask → MultiVectorMask are not supported",
    ),
    "filling without a mask": (
        {
            "modules": [f"{_BASE}transformer.Transformer"],
            "transformer": {"query_expansion": _FILLED},
        },
        "modules.json has no MultiVectorMask",
    ),
    "tokens to keep": ({"mask": {"keep_only_token_ids": [3]}}, r"keep_only_token_ids is \[3\]"),
    "an unknown key of the mask": ({"mask": {"newer": 1}}, "not supported: newer"),
    "other tasks": (
        {"mask": {"skiplist_tasks": ["clustering"]}},
        "skiplist_tasks has 'clustering'",
    ),
    "words that are none": ({"mask": {"skiplist_words": [3]}}, r"skiplist_words is \[3\]"),
    "a short query": (
        {"transformer": {"query_length": 9, "query_expansion": _FILLED}},
        "query_length is 9, expected at least",
    ),
    "no length": (
        {"transformer": {"query_expansion": {"strategy": "fixed"}}},
        "query_expansion has no length",
    ),
    "a strategy": (
        {"transformer": {"query_expansion": {"strategy": "most", "length": 3}}},
        "strategy='most', expected 'fixed' or 'min'",
    ),
    "an unknown key of the filling": (
        {"transformer": {"query_expansion": {**_FILLED, "more": 1}}},
        "query_expansion has more, expected only",
    ),
    "attend": (
        {"transformer": {"query_expansion": {**_FILLED, "attend": 1}}},
        "attend=1, expected true or false",
    ),
    "a token": (
        {"transformer": {"query_expansion": {**_FILLED, "token": 4}}},
        "token=4, expected a token's text",
    ),
    "no object": ({"transformer": {"query_expansion": True}}, "query_expansion is True"),
    "a length": (
        {"transformer": {"document_length": 0}},
        "document_length is 0, expected a positive",
    ),
    "a similarity": ({"settings": {"similarity_fn_name": "xtr"}}, "the similarity 'xtr'"),
    "dimensions": ({"settings": {"truncate_dim": 8}}, "truncate_dim is 8, expected null"),
    "another normalization": (
        {"normalize": {}},
        "module_input_name='sentence_embedding' is not supported, only 'token_embeddings'",
    ),
    "another vector": (
        {"dense": {"module_input_name": "sentence_embedding"}},
        "module_input_name='sentence_embedding' is not supported, only 'token_embeddings'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_vector_is_refused_by_name(case: str, tmp_path: Path) -> None:
    files, expected = REFUSED[case]
    with pytest.raises(CheckpointError, match=expected):
        native(tmp_path, **files)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"query_prefix": 3}, "query_prefix is 3, expected a text"),
        ({"do_query_expansion": "no"}, "do_query_expansion is 'no', expected true or false"),
        ({"query_length": "32"}, "length of query_expansion is '32', expected a positive"),
        ({"skiplist_words": "."}, "skiplist_words is '.', expected a list"),
    ],
)
def test_pylates_settings_have_their_types(
    settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=expected):
        read(tmp_path, {**_PYLATE, **settings})


def test_without_modules_the_file_alone_is_not_enough(tmp_path: Path) -> None:
    write_json(tmp_path / "config_sentence_transformers.json", _PYLATE)
    with pytest.raises(CheckpointError, match=r"there is no modules\.json"):
        read_modules(tmp_path, CONFIG)


def test_lengths_of_single_vector_models_are_refused(tmp_path: Path) -> None:
    modules = [f"{_BASE}transformer.Transformer", "sentence_transformers.models.Pooling"]
    (tmp_path / "1_module").mkdir()
    write_json(tmp_path / "1_module/config.json", {"pooling_mode": "mean"})
    with pytest.raises(CheckpointError, match="query_length=8 is not supported"):
        read(tmp_path, {}, modules=modules, transformer={"query_length": 8})
