"""LangChain: its vector store and retriever over a bundle, with the real package."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from embedge.runtime import EmbedgeValueError, FingerprintError
from tests.integrations.conftest import DOCUMENTS, Expected, near
from tests.runtime.conftest import TinyBundle

pytest.importorskip("langchain_core", reason="make test-integrations has LangChain")

from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from embedge.integrations.langchain import EmbedgeEmbeddings

CODE = {"precision": "fp32", "task": "code"}


@pytest.fixture
def embeddings(bundle: TinyBundle) -> EmbedgeEmbeddings:
    return EmbedgeEmbeddings(bundle.path, precision="fp32", task="code")


def test_vectors_are_lists_of_floats(embeddings: EmbedgeEmbeddings, expected: Expected) -> None:
    assert isinstance(embeddings, Embeddings)
    vector, vectors = embeddings.embed_query("w1 w2"), embeddings.embed_documents(DOCUMENTS)
    assert type(vector) is list and {type(value) for value in vector} == {float}
    near(vector, expected.query("w1 w2"))
    assert {type(value) for row in vectors for value in row} == {float}
    near(vectors, expected.documents(DOCUMENTS))
    assert embeddings.embed_documents([]) == []


@pytest.mark.parametrize("query", ["w1 w2", "w6 w5", "w9"])
def test_a_search_finds_what_the_weights_say(
    embeddings: EmbedgeEmbeddings, expected: Expected, query: str
) -> None:
    store = InMemoryVectorStore.from_texts(DOCUMENTS, embeddings)
    found = [document.page_content for document in store.similarity_search(query, k=5)]
    assert found == expected.found(query)


def test_asynchronous_calls(embeddings: EmbedgeEmbeddings, expected: Expected) -> None:
    async def search() -> tuple[Any, ...]:
        store = await InMemoryVectorStore.afrom_texts(DOCUMENTS, embeddings)
        retriever = store.as_retriever(search_kwargs={"k": 1})
        vectors = await asyncio.gather(*map(embeddings.aembed_query, DOCUMENTS))
        return await retriever.abatch(["w1 w2", "w9"]), vectors

    batches, vectors = asyncio.run(search())
    assert [hits[0].page_content for hits in batches] == [
        expected.found("w1 w2")[0],
        expected.found("w9")[0],
    ]
    near(vectors, [expected.query(text) for text in DOCUMENTS])


def test_what_cannot_be_used_is_an_error_at_once(bundle: TinyBundle, tmp_path: Path) -> None:
    with pytest.raises(EmbedgeValueError, match="no task 'sorting'"):
        EmbedgeEmbeddings(bundle.path, precision="fp32", task="sorting")
    with pytest.raises(EmbedgeValueError, match="truncate_dim is 5"):
        EmbedgeEmbeddings(bundle.path, precision="fp32", task="code", truncate_dim=5)
    with pytest.raises(EmbedgeValueError, match="put it into a list"):
        EmbedgeEmbeddings(bundle.path, precision="fp32", task="code").embed_documents("w1")  # type: ignore[arg-type]


def test_an_index_of_another_kind_is_refused(
    bundle: TinyBundle, embeddings: EmbedgeEmbeddings
) -> None:
    stored = json.loads(json.dumps(embeddings.stored_fingerprint()))
    embeddings.check_fingerprint(stored)
    embeddings.check_fingerprint(embeddings.fingerprint())
    with pytest.raises(FingerprintError) as raised:
        EmbedgeEmbeddings(bundle.path, precision="fp32", task="retrieval", fingerprint=stored)
    assert raised.value.differing == ("graph",)


def test_it_pickles_and_says_what_it_is(embeddings: EmbedgeEmbeddings, expected: Expected) -> None:
    other = pickle.loads(pickle.dumps(embeddings))
    near(other.embed_query("w3"), expected.query("w3"))
    assert other.embedder is embeddings.embedder
    assert re.fullmatch(
        r"EmbedgeEmbeddings\('.*bundle', task='code', precision='fp32', dim=8\)", repr(embeddings)
    )
