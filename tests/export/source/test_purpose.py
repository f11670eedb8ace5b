"""A model whose output is a head's is refused, or warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embedge.export.errors import CheckpointError
from embedge.export.source.card import read_card
from embedge.export.source.sentence_transformers import read_modules
from embedge.runtime import EmbedgeWarning
from tests.helpers.sentence_files import CONFIG, write_model


@pytest.mark.parametrize(
    ("card", "config", "message"),
    [
        ("---\ntags:\n- splade\n---\n", {}, "tag splade says that this is a sparse encoder"),
        ("---\npipeline_tag: text-ranking\n---\n", {}, "tag text-ranking"),
        ("", {"sentence_transformers": {"activation_fn": "x"}}, "of a cross-encoder"),
        ("", {"sbert_ce_default_activation_function": "x"}, "of a cross-encoder"),
    ],
)
def test_files_that_say_the_output_is_a_heads_are_refused(
    card: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(CheckpointError, match=message):
        read_modules(tmp_path, CONFIG | config, read_card(tmp_path))
    write_model(tmp_path)
    read_modules(tmp_path, CONFIG | config, read_card(tmp_path))  # a pipeline says otherwise


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_a_head_that_is_left_out_without_modules_is_warned_of(name: str, tmp_path: Path) -> None:
    with pytest.warns(EmbedgeWarning, match=f"names {name}"):
        read_modules(tmp_path, CONFIG | {"architectures": [name]})
