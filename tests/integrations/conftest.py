from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.runtime.conftest import WORDS, TinyBundle, bundles_in

DOCUMENTS = ["w1 w2", "w3 w4", "w5 w6", "w7 w1", "w2 w8 w9"]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """Two tasks at two precisions, whose queries and documents have prompts of their own."""
    return bundles_in(tmp_path_factory.mktemp("integrated"))(
        "bundle",
        tasks=("retrieval", "code"),
        precisions={"fp32": {}, "int4": {}},
        prompts={"query": "query: ", "passage": "passage: "},
        default_prompt="query",
        model={"matryoshka_dims": [2, 4, 8]},
    )


class Expected:
    """What the bundle's weights give, without embedge."""

    def __init__(self, bundle: TinyBundle, task: str = "code", dim: int = 8) -> None:
        self.bundle, self.task, self.dim = bundle, task, dim

    def vector(self, text: str) -> NDArray[np.float32]:
        """Of a text with its prompt, float32 ``[dim]``."""
        ids = [WORDS.index(word) for word in f"[CLS] {text} [SEP]".split()]
        vector = self.bundle.expected(self.task, ids)[: self.dim]
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    def query(self, text: str) -> NDArray[np.float32]:
        return self.vector(f"query: {text}")

    def documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.stack([self.vector(f"passage: {text}") for text in texts])

    def found(self, query: str, texts: Sequence[str] = DOCUMENTS) -> list[str]:
        """Texts, the nearest first."""
        order = np.argsort(-(self.documents(texts) @ self.query(query)))
        return [texts[index] for index in order]


def near(one: Any, other: Any) -> None:
    """Float32 products may differ in their last bit with the rows of a batch."""
    np.testing.assert_allclose(one, other, atol=1e-6, rtol=0, strict=False)
    assert np.shape(one) == np.shape(other)


@pytest.fixture
def expected(bundle: TinyBundle) -> Expected:
    return Expected(bundle)
