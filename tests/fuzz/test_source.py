"""A few mutations of sources in every run of the tests; thousands by name."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from embedge.runtime import EmbedgeError
from tests.fuzz.child import Outcome, Wrong, run
from tests.fuzz.source import make_sources, mutation


@pytest.mark.slow
def test_exports_of_damaged_sources_end_in_vectors_or_refusals(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)

    outcomes = [mutation(sources, 1, number) for number in range(60)]

    assert [(what, outcome) for what, outcome in outcomes if outcome.is_fault] == []
    assert {outcome.kind for _, outcome in outcomes} == {"right", "refused"}


@pytest.mark.slow
def test_every_way_to_end_is_told(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.write_text("x")

    def ended(function: object, **options: object) -> Outcome:
        return run(function, root=tmp_path, allowed=[inside], **options)  # type: ignore[arg-type]

    def refuse() -> None:
        raise EmbedgeError("no")

    def be_wrong() -> None:
        raise Wrong("1, expected 2")

    assert ended(lambda: (inside / "new").write_text("x")) == Outcome("right", "1")
    assert ended(refuse) == Outcome("refused", "EmbedgeError: no")
    assert ended(be_wrong) == Outcome("wrong", "1, expected 2")
    assert ended(lambda: 1 / 0).kind == "foreign"
    assert ended(lambda: bytearray(1 << 45)).kind == "foreign"
    assert ended(lambda: os.kill(os.getpid(), 9)) == Outcome("crash", "SIGKILL")
    assert ended(lambda: time.sleep(60), seconds=0.3).kind == "hang"
    assert ended(outside.read_text).kind == "outside"
    assert ended(lambda: (tmp_path.parent / "new").write_text("x")).kind == "outside"
