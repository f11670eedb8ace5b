"""Chroma: a collection that stores its embedding function and builds it again, with the real package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embedge.runtime import EmbedgeValueError, FingerprintError
from tests.helpers.documents import ROOT
from tests.integrations.conftest import DOCUMENTS, Expected, near
from tests.runtime.conftest import TinyBundle, bundles_in

pytest.importorskip("chromadb", reason="make test-integrations has Chroma")

import chromadb
from chromadb.utils.embedding_functions import known_embedding_functions

from embedge.integrations.chroma import EmbedgeEmbeddingFunction

IDS = [f"id-{text}" for text in DOCUMENTS]


def function(bundle: TinyBundle, **options: Any) -> EmbedgeEmbeddingFunction:
    return EmbedgeEmbeddingFunction(bundle.path, **{"precision": "fp32", "task": "code", **options})


@pytest.fixture
def client(tmp_path: Path) -> Any:
    return chromadb.PersistentClient(tmp_path / "chroma")


def filled(client: Any, bundle: TinyBundle, **options: Any) -> Any:
    collection = client.create_collection("texts", embedding_function=function(bundle, **options))
    collection.add(ids=IDS, documents=DOCUMENTS)
    return collection


@pytest.mark.parametrize("query", ["w1 w2", "w6 w5", "w9"])
def test_a_search_finds_what_the_weights_say(
    client: Any, bundle: TinyBundle, expected: Expected, query: str
) -> None:
    collection = filled(client, bundle)
    found = collection.query(query_texts=[query], n_results=5)
    assert found["documents"] == [expected.found(query)]
    near(collection.get(IDS, include=["embeddings"])["embeddings"], expected.documents(DOCUMENTS))
    distances = 1 - expected.documents(expected.found(query)) @ expected.query(query)
    np.testing.assert_allclose(
        found["distances"][0], distances, atol=1e-5
    )  # cosine, not Chroma's l2


def test_vectors(bundle: TinyBundle, expected: Expected) -> None:
    embed = function(bundle)
    assert {vector.dtype for vector in embed(DOCUMENTS)} == {np.dtype(np.float32)}
    near(embed(DOCUMENTS), expected.documents(DOCUMENTS))
    near(embed.embed_query(["w1"]), [expected.query("w1")])
    assert not embed.is_legacy()
    assert known_embedding_functions["embedge"] is EmbedgeEmbeddingFunction


def test_how_it_compares_is_the_models(bundle: TinyBundle, tmp_path: Path) -> None:
    dot = bundles_in(tmp_path)("dot", model={"similarity": "dot"})
    assert function(bundle).default_space() == "cosine"
    assert EmbedgeEmbeddingFunction(dot.path).default_space() == "ip"
    assert function(bundle).default_space() in function(bundle).supported_spaces()


def test_a_collection_builds_it_again(client: Any, bundle: TinyBundle, expected: Expected) -> None:
    made = filled(client, bundle, prompts={"query": "w9 "}, batch_size=2)
    embedder = function(bundle).embedder
    parts = embedder.fingerprint_parts(task="code", role="document")
    config = made.configuration_json["embedding_function"]
    assert (config["type"], config["name"]) == ("known", "embedge")
    assert config["config"] == {
        "bundle": str(bundle.path),
        "task": "code",
        "precision": "fp32",
        "prompts": {"query": "w9 "},
        "batch_size": 2,
        "fingerprint": {"fingerprint": function(bundle).fingerprint(), "parts": parts},
    }
    opened = client.get_collection("texts")
    found = opened.query(query_texts=["w1"], n_results=5)
    order = np.argsort(-(expected.documents(DOCUMENTS) @ expected.vector("w9 w1")))
    assert found["ids"] == [[IDS[index] for index in order]]


@pytest.mark.slow
def test_another_process_builds_it_again(
    tmp_path: Path, bundle: TinyBundle, expected: Expected
) -> None:
    filled(chromadb.PersistentClient(tmp_path / "chroma"), bundle)
    code = f"""
import chromadb, embedge.integrations.chroma
collection = chromadb.PersistentClient({str(tmp_path / "chroma")!r}).get_collection("texts")
print(*collection.query(query_texts=["w6 w5"], n_results=5)["documents"][0], sep="\\n")
"""
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected.found("w6 w5")


class TestRefusals:
    def test_a_bundle_that_gives_other_vectors_now(self, client: Any, tmp_path: Path) -> None:
        make = bundles_in(tmp_path)
        one = make("one", tasks=("code",))
        collection = client.create_collection(
            "texts", embedding_function=EmbedgeEmbeddingFunction(one.path)
        )
        collection.add(ids=IDS, documents=DOCUMENTS)
        os.rename(one.path, tmp_path / "old")
        os.rename(make("two", tasks=("other", "code"), precisions={"fp32": {}}).path, one.path)
        with pytest.raises(ValueError, match=r"expected vectors of the fingerprint .*graph"):
            client.get_collection("texts").query(query_texts=["w1"])

    def test_a_function_of_ones_own_for_another_task(self, client: Any, bundle: TinyBundle) -> None:
        filled(client, bundle)
        good, bad = function(bundle), function(bundle, task="retrieval")
        good.check_collection(client.get_collection("texts", embedding_function=good))
        with pytest.raises(FingerprintError) as raised:
            bad.check_collection(client.get_collection("texts", embedding_function=bad))
        assert raised.value.differing == ("graph",)

    def test_a_collection_of_another_function(self, client: Any, bundle: TinyBundle) -> None:
        collection = client.create_collection("plain", embedding_function=None)
        with pytest.raises(EmbedgeValueError, match="'plain': expected one made with .*'embedge'"):
            function(bundle).check_collection(collection)

    def test_a_collection_without_a_fingerprint(self, client: Any, bundle: TinyBundle) -> None:
        filled(client, bundle)
        good = function(bundle)
        stored = {"name": "embedge", "config": {"bundle": "b", "task": "code", "precision": "fp32"}}
        collection: Any = SimpleNamespace(
            name="texts", configuration_json={"embedding_function": stored}
        )
        with pytest.raises(EmbedgeValueError, match="has no fingerprint"):
            good.check_collection(collection)

    def test_an_update_to_another_task(self, bundle: TinyBundle, tmp_path: Path) -> None:
        old, new = function(bundle).get_config(), function(bundle, task="retrieval").get_config()
        with pytest.raises(FingerprintError, match="graph: "):
            function(bundle).validate_config_update(old, new)
        moved = old | {"bundle": str(shutil.copytree(bundle.path, tmp_path / "moved"))}
        function(bundle).validate_config_update(old, moved)

    def test_a_config_that_is_none_of_its(self, bundle: TinyBundle) -> None:
        config = function(bundle).get_config()
        with pytest.raises(EmbedgeValueError, match="has no task, fingerprint"):
            EmbedgeEmbeddingFunction.build_from_config({"bundle": "b", "precision": "int8"})
        with pytest.raises(EmbedgeValueError, match="does not know: colour"):
            EmbedgeEmbeddingFunction.build_from_config(config | {"colour": 1})

    def test_what_cannot_be_used_is_an_error_at_once(self, bundle: TinyBundle) -> None:
        with pytest.raises(EmbedgeValueError, match="no task 'sorting'"):
            function(bundle, task="sorting")
        with pytest.raises(EmbedgeValueError, match="truncate_dim is 5"):
            function(bundle, truncate_dim=5)
        embed: Any = function(bundle)
        with pytest.raises(EmbedgeValueError, match=r"inputs\[0\]"):
            embed([np.zeros((2, 2), np.uint8)])
