"""Haystack: pipelines that index and search, and are stored as YAML, with the real package."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from embedge.runtime import BundleError, EmbedgeValueError, EmbedgeWarning, FingerprintError
from embedge.runtime.encode.fingerprint import fingerprint_of
from embedge.runtime.kernels.numerics import CLASSES
from tests.integrations.conftest import DOCUMENTS, Expected, near
from tests.runtime.conftest import TinyBundle

pytest.importorskip("haystack", reason="make test-integrations has Haystack")

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore

from embedge.integrations.haystack import (
    EmbedgeDocumentEmbedder,
    EmbedgeFingerprintChecker,
    EmbedgeTextEmbedder,
)

ALLOWED = ["embedge.integrations.haystack"]
CODE: Any = {"precision": "fp32", "task": "code"}


def documents() -> list[Document]:
    return [Document(content=text, meta={"title": f"w1{i}"}) for i, text in enumerate(DOCUMENTS)]


def indexing(bundle: TinyBundle, store: InMemoryDocumentStore, **options: Any) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("embedder", EmbedgeDocumentEmbedder(str(bundle.path), **CODE, **options))
    pipeline.add_component("writer", DocumentWriter(store))
    pipeline.connect("embedder.documents", "writer.documents")
    return pipeline


def searching(bundle: TinyBundle, store: InMemoryDocumentStore, **options: Any) -> Pipeline:
    options = {**CODE, **options}
    pipeline = Pipeline()
    pipeline.add_component("embedder", EmbedgeTextEmbedder(str(bundle.path), **options))
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=5))
    pipeline.add_component("checker", EmbedgeFingerprintChecker(str(bundle.path), **options))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    pipeline.connect("retriever.documents", "checker.documents")
    return pipeline


@pytest.fixture
def store(bundle: TinyBundle) -> InMemoryDocumentStore:
    """The documents with their vectors."""
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    indexing(bundle, store).run({"embedder": {"documents": documents()}})
    return store


@pytest.mark.parametrize("query", ["w1 w2", "w6 w5", "w9"])
def test_a_search_finds_what_the_weights_say(
    bundle: TinyBundle, store: InMemoryDocumentStore, expected: Expected, query: str
) -> None:
    found = searching(bundle, store).run({"embedder": {"text": query}})
    assert [one.content for one in found["checker"]["documents"]] == expected.found(query)


def test_vectors_and_meta(bundle: TinyBundle, expected: Expected) -> None:
    given = documents()
    embedder = EmbedgeDocumentEmbedder(bundle.path, **CODE)
    embedder.warm_up()
    result = embedder.run(given)
    near([one.embedding for one in result["documents"]], expected.documents(DOCUMENTS))
    assert {type(value) for one in result["documents"] for value in one.embedding} == {float}
    assert [one.id for one in result["documents"]] == [one.id for one in given]
    assert {one.embedding for one in given} == {None}  # copies were embedded
    assert result["documents"][0].meta == {
        "title": "w10",
        "embedge_fingerprint": embedder.fingerprint(),
    }
    text = EmbedgeTextEmbedder(bundle.path, **CODE)
    answer = text.run("w1 w2")
    near(answer["embedding"], expected.query("w1 w2"))
    assert (
        answer["meta"]
        == result["meta"]
        == {
            "model": "tiny",
            "task": "code",
            "precision": "fp32",
            "fingerprint": embedder.fingerprint(),
        }
    )
    assert text.embedder is embedder.embedder
    assert embedder.run([])["documents"] == []


def test_meta_fields_come_before_the_content(bundle: TinyBundle, expected: Expected) -> None:
    embedder = EmbedgeDocumentEmbedder(
        bundle.path,
        **CODE,
        meta_fields_to_embed=["title", "absent"],
        embedding_separator=" ",
        fingerprint_field=None,
    )
    [one] = embedder.run([Document(content="w2", meta={"title": "w10", "absent": None})])[
        "documents"
    ]
    near(one.embedding, expected.documents(["w10 w2"])[0])
    assert one.meta == {"title": "w10", "absent": None}


def test_a_device_may_be_haystacks(bundle: TinyBundle) -> None:
    from haystack.utils import ComponentDevice

    options: Any = {**CODE, "device": ComponentDevice.from_str("cpu")}
    embedder = EmbedgeTextEmbedder(bundle.path, **options)
    assert embedder.to_dict()["init_parameters"]["device"] == "cpu"
    assert embedder.embedder.device == "cpu"


@pytest.mark.parametrize(
    ("make", "graph", "given"),
    [
        (EmbedgeTextEmbedder, "retrieval", "w1"),
        (EmbedgeDocumentEmbedder, "code", [Document(content="w1")]),
    ],
)
def test_warm_up_opens_the_graph(
    bundle: TinyBundle, tmp_path: Path, make: Any, graph: str, given: Any
) -> None:
    for warm in (True, False):
        copy = shutil.copytree(bundle.path, tmp_path / str(warm))
        embedder = make(copy, **CODE, query_task="retrieval")
        if warm:
            embedder.warm_up()
        (copy / "fp32" / f"{graph}.onnx").unlink()
        with contextlib.nullcontext() if warm else pytest.raises(BundleError):
            embedder.run(given)


def test_asynchronous_pipelines(
    bundle: TinyBundle, store: InMemoryDocumentStore, expected: Expected
) -> None:
    async def search() -> Any:
        pipeline = searching(bundle, store)
        return await asyncio.gather(
            *(pipeline.run_async({"embedder": {"text": text}}) for text in ("w1 w2", "w9"))
        )

    one, two = asyncio.run(search())
    assert [d.content for d in one["checker"]["documents"]] == expected.found("w1 w2")
    assert [d.content for d in two["checker"]["documents"]] == expected.found("w9")
    result = asyncio.run(EmbedgeDocumentEmbedder(bundle.path, **CODE).run_async(documents()))
    near([d.embedding for d in result["documents"]], expected.documents(DOCUMENTS))


def test_pipelines_are_stored_as_yaml(bundle: TinyBundle, expected: Expected) -> None:
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    pipeline = indexing(
        bundle, store, truncate_dim=4, meta_fields_to_embed=["title"], embedding_separator=" "
    )
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=ALLOWED)
    assert again.to_dict() == pipeline.to_dict()
    parameters = again.to_dict()["components"]["embedder"]["init_parameters"]
    assert parameters == {
        **CODE,
        "bundle": str(bundle.path),
        "truncate_dim": 4,
        "meta_fields_to_embed": ["title"],
        "embedding_separator": " ",
        "fingerprint_field": "embedge_fingerprint",
        "progress_bar": False,
    }
    search = searching(bundle, store, truncate_dim=4)
    assert Pipeline.loads(search.dumps(), allowed_modules=ALLOWED).to_dict() == search.to_dict()
    embedder: Any = again.get_component("embedder")
    [one] = embedder.run([Document(content="w2", meta={"title": "w10"})])["documents"]
    near(one.embedding, Expected(bundle, dim=4).documents(["w10 w2"])[0])


class TestRefusals:
    def test_what_cannot_be_used_is_an_error_at_once(self, bundle: TinyBundle) -> None:
        for make in (EmbedgeTextEmbedder, EmbedgeDocumentEmbedder, EmbedgeFingerprintChecker):
            with pytest.raises(EmbedgeValueError, match="no task 'sorting'"):
                make(bundle.path, precision="fp32", task="sorting")
            with pytest.raises(EmbedgeValueError, match="truncate_dim is 5"):
                make(bundle.path, **CODE, truncate_dim=5)

    def test_what_is_no_document_is_named(self, bundle: TinyBundle) -> None:
        embedder: Any = EmbedgeDocumentEmbedder(bundle.path, **CODE)
        with pytest.raises(TypeError, match="found str$"):
            embedder.run("w1")
        with pytest.raises(TypeError, match="found str at index 1"):
            embedder.run([Document(content="w1"), "w2"])
        with pytest.raises(EmbedgeValueError, match="document picture: expected content"):
            embedder.run([Document(id="picture")])
        queries: Any = EmbedgeTextEmbedder(bundle.path, **CODE)
        with pytest.raises(EmbedgeValueError, match="expected a string, found list"):
            queries.run(["w1"])

    def test_documents_of_another_task_do_not_get_through(
        self, bundle: TinyBundle, store: InMemoryDocumentStore
    ) -> None:
        with pytest.raises(Exception, match=r"document \w+: expected vectors of") as raised:
            searching(bundle, store, task="retrieval").run({"embedder": {"text": "w1"}})
        assert isinstance(raised.value.__cause__ or raised.value, FingerprintError)

    def test_nor_do_those_without_a_fingerprint(self, bundle: TinyBundle) -> None:
        checker = EmbedgeFingerprintChecker(bundle.path, **CODE)
        with pytest.raises(
            FingerprintError, match="document a: .*'embedge_fingerprint', found none"
        ):
            checker.run([Document(id="a", content="w1")])

    def test_another_machines_arithmetic_is_warned_of_once(self, bundle: TinyBundle) -> None:
        checker = EmbedgeFingerprintChecker(bundle.path, **CODE)
        parts = checker.embedder.fingerprint_parts(task="code", role="document")
        [other, *_] = [name for name in CLASSES if name != parts["numerics"]]
        stored = fingerprint_of(parts | {"numerics": other})
        given = [Document(content=text, meta={"embedge_fingerprint": stored}) for text in DOCUMENTS]
        with pytest.warns(EmbedgeWarning, match="numerics") as warned:
            assert checker.run(given)["documents"] == given
        assert len(warned) == 1
