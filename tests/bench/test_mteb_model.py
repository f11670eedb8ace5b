"""What a bundle does for mteb: which task and prompt, which scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.bench import mteb_model
from embedge.bench.errors import BenchArgumentError
from embedge.bench.mteb_model import EmbedgeEncoder, bundle_task, main

pytestmark = pytest.mark.slow

ALL = ("retrieval", "text-matching", "code")


class PromptType(Enum):
    query = "query"
    document = "document"


@dataclass
class Metadata:
    type: str
    name: str = "Something"
    domains: Sequence[str] | None = None
    eval_langs: Sequence[str] | Mapping[str, Sequence[str]] = ("eng-Latn",)


class FakeEmbedder:
    """Writes down its calls; a vector is the text's length."""

    tasks: tuple[str, ...] = ALL

    def __init__(self, bundle: object, **options: Any) -> None:
        self.calls: list[tuple[str, list[Any], dict[str, Any]]] = []

    def _record(self, method: str, items: list[Any], options: dict[str, Any]) -> Any:
        self.calls.append((method, items, options))
        if options["multi_vector"]:
            return [np.full((2 + i, 3), i, np.float32) for i in range(len(items))]
        return np.array([[len(str(item)), 1] for item in items], np.float32)

    def encode(self, items: list[Any], **options: Any) -> Any:
        return self._record("encode", items, options)

    def encode_query(self, items: list[Any], **options: Any) -> Any:
        return self._record("encode_query", items, options)

    def encode_document(self, items: list[Any], **options: Any) -> Any:
        return self._record("encode_document", items, options)

    def encode_image(self, items: list[Any], **options: Any) -> Any:
        return self._record("encode_image", items, options)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mteb_model, "Embedder", FakeEmbedder)


def only_call(encoder: EmbedgeEncoder) -> tuple[str, list[Any], dict[str, Any]]:
    [call] = encoder.embedder.calls  # type: ignore[attr-defined]
    return call


@pytest.mark.parametrize(
    ("metadata", "prompt_type", "method", "task"),
    [
        (Metadata("Retrieval"), PromptType.query, "encode_query", "retrieval"),
        (Metadata("Retrieval"), PromptType.document, "encode_document", "retrieval"),
        (Metadata("Reranking"), PromptType.document, "encode_document", "retrieval"),
        (Metadata("DocumentUnderstanding"), PromptType.query, "encode_query", "retrieval"),
        (Metadata("Clustering"), None, "encode_query", "retrieval"),
        (Metadata("STS"), None, "encode", "text-matching"),
        (Metadata("PairClassification"), None, "encode", "text-matching"),
        (Metadata("Retrieval", domains=["Programming"]), PromptType.query, "encode_query", "code"),
        (
            Metadata("Retrieval", eval_langs=["eng-Latn", "python-Code"]),
            PromptType.document,
            "encode_document",
            "code",
        ),
        (
            Metadata("Retrieval", eval_langs={"go": ["eng-Latn", "go-Code"]}),
            PromptType.query,
            "encode_query",
            "code",
        ),
        (Metadata("STS", domains=["Programming"]), None, "encode_query", "code"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_task_and_prompt(
    metadata: Metadata, prompt_type: PromptType | None, method: str, task: str
) -> None:
    encoder = EmbedgeEncoder("bundle", "int8", truncate_dim=128)
    batches = [{"text": ["a", "bcd"]}, {"text": ["ef"], "id": ["3"]}]

    vectors = encoder.encode(batches, task_metadata=metadata, prompt_type=prompt_type, batch_size=7)

    called, items, options = only_call(encoder)
    assert (called, items, options["task"]) == (method, ["a", "bcd", "ef"], task)
    assert (options["truncate_dim"], options["batch_size"]) == (128, 7)
    assert vectors[:, 0].tolist() == [1, 3, 2]


@pytest.mark.usefixtures("fake")
def test_pages_are_images_of_retrieval_a_batch_at_a_time() -> None:
    encoder = EmbedgeEncoder("bundle", max_pixels=1000)
    batches = [{"image": ["page one", "two"], "id": ["1", "2"]}, {"image": ["three"]}]

    vectors = encoder.encode(
        batches, task_metadata=Metadata("DocumentUnderstanding"), prompt_type=PromptType.document
    )

    calls = encoder.embedder.calls  # type: ignore[attr-defined]
    assert [(method, items) for method, items, _ in calls] == [
        ("encode_image", ["page one", "two"]),
        ("encode_image", ["three"]),
    ]
    assert all(o["max_pixels"] == 1000 and o["task"] == "retrieval" for _, _, o in calls)
    assert vectors[:, 0].tolist() == [8, 3, 5]


@pytest.mark.usefixtures("fake")
def test_multi_vectors_stay_a_list() -> None:
    encoder = EmbedgeEncoder("bundle", multi_vector=True)

    vectors = encoder.encode(
        [{"image": ["a", "b"]}, {"image": ["c"]}],
        task_metadata=Metadata("DocumentUnderstanding"),
        prompt_type=PromptType.document,
    )

    assert [each.shape for each in vectors] == [(2, 3), (3, 3), (2, 3)]
    with pytest.raises(BenchArgumentError, match="leave multi_vector out"):
        encoder.encode([{"text": ["a"]}], task_metadata=Metadata("STS"))


@pytest.mark.parametrize("batch", [{"text": ["a"], "image": ["b"]}, {"audio": ["c"]}])
@pytest.mark.usefixtures("fake")
def test_rows_of_anything_else_are_refused_by_their_columns(batch: dict[str, list[str]]) -> None:
    with pytest.raises(BenchArgumentError, match=f"found the columns {', '.join(batch)}"):
        EmbedgeEncoder("bundle").encode([batch], task_metadata=Metadata("Retrieval"))


def test_a_bundle_with_one_task_uses_it() -> None:
    assert bundle_task(Metadata("STS"), ["plain"]) == "plain"


def test_a_task_that_is_not_there_is_an_error_with_those_that_are() -> None:
    metadata = Metadata("STS", name="STSBenchmark")

    with pytest.raises(BenchArgumentError) as found:
        bundle_task(metadata, ["retrieval", "code"])

    assert str(found.value) == (
        "mteb's STSBenchmark (STS) needs the task 'text-matching'; the bundle has: retrieval, code"
    )


def test_without_mteb_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(mteb_model, "find_spec", lambda name: None)

    assert main(["bundle", "--tasks", "SciFact", "--out", str(tmp_path)]) == 1
    assert 'pip install "mteb>=' in capsys.readouterr().err
