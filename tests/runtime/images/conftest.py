from __future__ import annotations

from typing import Any

import pytest

from embedge.runtime import Embedder
from embedge.runtime.sessions.session import GraphSession


@pytest.fixture
def model(with_images: Any) -> Embedder:
    return Embedder(with_images.path)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Graph and shape (images × patches, or rows × tokens) of every run."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    run = GraphSession.run

    def recording(self: GraphSession, output: str, inputs: Any) -> Any:
        main = inputs["pixel_values" if "pixel_values" in inputs else "input_ids"]
        seen.append((self.file.stem, main.shape[:2]))
        return run(self, output, inputs)

    monkeypatch.setattr(GraphSession, "run", recording)
    return seen
