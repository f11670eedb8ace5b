"""sentence_bert_config.json is followed, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embedge.export.errors import CheckpointError
from embedge.export.source.sentence_transformers import read_modules
from tests.helpers.sentence_files import CONFIG, write_model


def test_lower_casing_is_fine_where_the_tokenizer_does_it(tmp_path: Path) -> None:
    for normalizer in (
        {"type": "Lowercase"},
        {"type": "BertNormalizer", "lowercase": True},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
    ):
        files: dict[str, Any] = {
            "transformer": {"do_lower_case": True},
            "tokenizer_file": {"normalizer": normalizer},
        }
        assert read_modules(write_model(tmp_path, **files), CONFIG).pooling == "mean"


def test_arguments_of_the_tokenizer_and_lower_casing_are_passed_on(tmp_path: Path) -> None:
    arguments = {"truncation_side": "left", "trust_remote_code": True}
    write_model(tmp_path, transformer={"tokenizer_args": arguments, "do_lower_case": True})
    settings = read_modules(tmp_path, CONFIG)
    assert settings.tokenizer_settings == {"truncation_side": "left"}
    assert settings.lowercase


def test_the_older_name_of_the_tokenizers_arguments_takes_the_place_of_the_newer(
    tmp_path: Path,
) -> None:
    both = {"processor_kwargs": {"model_max_length": 5, "a": 1}, "tokenizer_args": {"b": 2}}
    write_model(tmp_path, transformer={"max_seq_length": 9, **both})
    settings = read_modules(tmp_path, CONFIG)
    assert (settings.max_length, settings.tokenizer_settings) == (9, {"b": 2})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_args", {"use_bidirectional_attention": True}),
        ("config_args", {"rope_theta": 5.0}),
        ("config_kwargs", {"hidden_act": "relu"}),
        ("model_kwargs", {"subfolder": "other"}),
        ("tokenizer_name_or_path", "other"),
        ("something_new", 3),
    ],
)
def test_arguments_that_are_neither_used_nor_harmless_are_refused(
    key: str, value: Any, tmp_path: Path
) -> None:
    write_model(tmp_path, transformer={key: value})
    with pytest.raises(CheckpointError, match=f"{key}.*delete it"):
        read_modules(tmp_path, CONFIG)


def test_how_a_model_is_loaded_is_harmless(tmp_path: Path) -> None:
    loading = {"torch_dtype": "bfloat16", "attn_implementation": "sdpa", "trust_remote_code": True}
    write_model(
        tmp_path, transformer={"model_args": loading, "config_args": {}, "backend": "torch"}
    )
    assert read_modules(tmp_path, CONFIG).pooling == "mean"
