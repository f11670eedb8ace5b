"""Single texts are timed as users pay for them: with the longer prompt of queries and documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.bench.measure.task import latency, longest_role
from embedge.bench.options import QUICK
from embedge.bench.systems.source import Source


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ({}, None),
        ({"query": "find: ", "passage": "text of a document: "}, "document"),
        ({"query": "a long instruction: ", "passage": "p: "}, "query"),
    ],
)
def test_the_role_of_the_longest_prompt(prompts: dict[str, str], expected: str | None) -> None:
    source = Source(path=Path(), transformer=Path(), pooling="mean", prompts=prompts)

    assert longest_role(source) == expected


def test_every_system_gets_the_role_and_each_text_its_rounds() -> None:
    seen: list[tuple[tuple[str, ...], int, str | None]] = []

    class Some:
        name = "some"
        role = "peer"
        precision: str | None = None
        bytes_on_disk: int | None = None

        def encode(
            self, texts: Sequence[str], batch_size: int = 32, role: str | None = None
        ) -> Any:
            seen.append((tuple(texts), batch_size, role))
            return np.zeros((1, 2), np.float32)

        def forward(self, ids: Any, mask: Any) -> object:
            raise AssertionError("no shape was asked for")

    unused: Any = None
    found = latency([Some()], unused, [], ["a", "b"], "document", (), QUICK, lambda _: None)

    assert set(seen) == {(("a",), 1, "document"), (("b",), 1, "document")}
    single = found["some"]["single"]
    assert (single["texts"], single["role"]) == (2, "document")
    assert len(seen) == 2 * 2 * QUICK.single_rounds  # each once untimed too
