"""A model's name and licence are its own, wherever its folder lies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from embedge.export.errors import CheckpointError
from embedge.export.source.checkpoint import Checkpoint
from tests.helpers.weight_files import write_model


@pytest.mark.parametrize(
    ("folder", "card", "named", "expected"),
    [
        ("my-model", "", None, "my-model"),
        ("model", "", "org/the-parent", "the-parent"),
        ("model", "", "/home/someone/runs/final-3/", "final-3"),
        (
            "model",
            "---\nlicense: mit\n# note\n---\n\n# all-MiniLM-L6-v2\n",
            "org/the-parent",
            "all-MiniLM-L6-v2",
        ),
        ("model", "# org/tiny-bert\ntext", "org/the-parent", "tiny-bert"),
        ("model", "# A model for everyone\n# x-1\n", "org/the-parent", "the-parent"),
        ("model", "# Introduction\n", "org/the-parent", "the-parent"),
        ("models--org--small-e5/snapshots/0a1b2c", "# e5-large", "org/the-parent", "small-e5"),
    ],
)
def test_the_name_is_short_and_never_a_path(
    folder: str, card: str, named: str | None, expected: str, tmp_path: Path
) -> None:
    write_model(tmp_path / folder, _name_or_path=named)
    (tmp_path / folder / "README.md").write_text(card)

    assert Checkpoint(tmp_path / folder).name == expected


@pytest.mark.parametrize(
    "plant",
    [os.mkfifo, Path.mkdir, lambda p: p.symlink_to("nowhere")],
    ids=["fifo", "folder", "link"],
)
def test_a_model_card_that_cannot_be_read_is_not_taken_for_none(
    plant: Callable[[Path], None], tmp_path: Path
) -> None:
    write_model(tmp_path)
    plant(tmp_path / "README.md")
    with pytest.raises(CheckpointError, match=r"README\.md: cannot be read: .*or remove it"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: 'mit' # really\n---\n", "mit"),
        ("---\nlicense:\n- mit\n- apache-2.0\ntags:\n- x\n---\n", "mit, apache-2.0"),
        ("---\nlicense: [mit, gpl-3.0]\n---\n", "mit, gpl-3.0"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research"),
        ("---\nlicense: other\n---\n", "other"),
        ("\ufeff---\nlicense: mit\n---\n", "mit"),
        ("---\nmodel:\n  license: mit\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("license: mit\n", None),
        (None, None),
    ],
)
def test_the_license_is_the_model_cards(
    card: str | None, expected: str | None, tmp_path: Path
) -> None:
    write_model(tmp_path)
    if card is not None:
        (tmp_path / "README.md").write_text(card, encoding="utf-8")

    assert Checkpoint(tmp_path).card.license == expected
