"""Each client's texts, lists, base64, dimensions and errors; vectors are the library's."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder
from tests.helpers.server_process import Server
from tests.helpers.serving import array_of
from tests.runtime.conftest import TinyBundle

TEXTS = ["w1 w2", "w3"]
NPM = Path(__file__).with_name("openai.cjs")


@pytest.fixture(scope="module")
def model(tasks_bundle: TinyBundle) -> Embedder:
    return Embedder(tasks_bundle.path, task="code")


@pytest.fixture(scope="module")
def found(server: Server, clients: Path) -> dict[str, Any]:
    """What npm's client gets, by the call."""
    command = ["node", str(NPM), str(clients), server.url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def same(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.array(found, np.float32), expected, rtol=0, atol=1e-6)


class TestNpm:
    """https://www.npmjs.com/package/openai"""

    @pytest.mark.parametrize("name", ["text", "float"])
    def test_a_text(self, found: dict[str, Any], model: Embedder, name: str) -> None:
        same(found[name]["data"], model.encode(TEXTS[:1]))
        tokens = model.count_tokens(TEXTS[0])
        assert found[name]["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}

    def test_a_list(self, found: dict[str, Any], model: Embedder) -> None:
        same(found["list"]["data"], model.encode(TEXTS))

    def test_base64(self, found: dict[str, Any], model: Embedder) -> None:
        [encoded] = found["base64"]["data"]
        same(array_of(encoded), model.encode(TEXTS[0]))

    def test_dimensions(self, found: dict[str, Any], model: Embedder) -> None:
        same(found["dimensions"]["data"], model.encode(TEXTS[:1], truncate_dim=4))

    def test_a_prompt(self, found: dict[str, Any], model: Embedder) -> None:
        same(found["query"]["data"], model.encode_query(TEXTS[:1], task="retrieval"))

    def test_models(self, found: dict[str, Any]) -> None:
        assert found["models"]["data"] == ["bundle", "bundle:retrieval", "bundle:code"]

    @pytest.mark.parametrize(
        ("name", "error"),
        [
            ("wrongModel", (404, "model_not_found", "model", "NotFoundError")),
            ("wrongDimensions", (400, None, "dimensions", "BadRequestError")),
            ("unknownField", (400, "unknown_parameter", "temperature", "BadRequestError")),
            ("wrongKey", (401, "invalid_api_key", None, "AuthenticationError")),
        ],
    )
    def test_errors(self, found: dict[str, Any], name: str, error: tuple[Any, ...]) -> None:
        assert tuple(found[name][key] for key in ("status", "code", "param", "name")) == error


class TestLangChain:
    """https://pypi.org/project/langchain-openai"""

    def embeddings(self, server: Server, **options: Any) -> Any:
        package = importlib.import_module("langchain_openai")  # in the job's environment alone
        options = {"model": "bundle:code", "api_key": "secret", "max_retries": 0, **options}
        base_url = f"{server.url}/v1"
        return package.OpenAIEmbeddings(
            base_url=base_url, check_embedding_ctx_length=False, **options
        )

    @pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}])
    def test_documents_and_a_query(
        self, server: Server, model: Embedder, encoding: dict[str, str]
    ) -> None:
        client = self.embeddings(server, model_kwargs=encoding)
        same(client.embed_documents(TEXTS), model.encode(TEXTS))
        same(client.embed_query(TEXTS[0]), model.encode(TEXTS[0]))

    def test_many_documents_in_several_requests(self, server: Server, model: Embedder) -> None:
        texts = [f"w{number}" for number in range(10)]
        same(self.embeddings(server, chunk_size=3).embed_documents(texts), model.encode(texts))

    def test_dimensions(self, server: Server, model: Embedder) -> None:
        client = self.embeddings(server, dimensions=4)
        same(client.embed_query(TEXTS[0]), model.encode(TEXTS[0], truncate_dim=4))

    def test_a_prompt(self, server: Server, model: Embedder) -> None:
        kwargs = {"extra_body": {"input_type": "query"}}
        client = self.embeddings(server, model="bundle:retrieval", model_kwargs=kwargs)
        same(client.embed_query(TEXTS[0]), model.encode_query(TEXTS[0], task="retrieval"))

    def test_errors(self, server: Server) -> None:
        import openai

        with pytest.raises(openai.NotFoundError, match="no model 'gpt'; there are bundle"):
            self.embeddings(server, model="gpt").embed_query("w1")
        with pytest.raises(openai.BadRequestError, match="dimensions is 5"):
            self.embeddings(server, dimensions=5).embed_query("w1")
        with pytest.raises(openai.AuthenticationError):
            self.embeddings(server, api_key="other").embed_query("w1")


class TestOpenAI:
    """https://pypi.org/project/openai"""

    def test_what_a_client_of_its_own_process_gets(self, server: Server, model: Embedder) -> None:
        import openai

        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
            create = client.embeddings.create
            answer = create(model="bundle:code", input=TEXTS)  # base64, which the client reads
            same([one.embedding for one in answer.data], model.encode(TEXTS))
            answer = create(model="bundle:code", input=TEXTS[0], dimensions=4)
            same(answer.data[0].embedding, model.encode(TEXTS[0], truncate_dim=4))
            [ids] = model.tokenize(TEXTS[0])
            answer = create(model="bundle:code", input=ids.ids.tolist())
            same(answer.data[0].embedding, model.encode(TEXTS[0]))
            with pytest.raises(openai.BadRequestError, match="dimensions is 5"):
                create(model="bundle:code", input="w1", dimensions=5)


class TestCurl:
    def ask(self, server: Server, body: dict[str, Any], key: str = "secret") -> tuple[int, Any]:
        command = ["curl", "-sS", f"{server.url}/v1/embeddings", "-d", json.dumps(body)]
        command += ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {key}"]
        done = subprocess.run([*command, "-w", "%{http_code}"], capture_output=True, check=True)
        return int(done.stdout[-3:]), json.loads(done.stdout[:-3])

    @pytest.mark.parametrize("encoding", ["float", "base64"])
    @pytest.mark.parametrize("dimensions", [None, 4])
    @pytest.mark.parametrize("texts", [TEXTS[0], TEXTS])
    def test_vectors(
        self, server: Server, model: Embedder, encoding: str, dimensions: int | None, texts: Any
    ) -> None:
        body = {"model": "bundle:code", "input": texts, "encoding_format": encoding}
        status, answer = self.ask(server, body | {"dimensions": dimensions})
        assert status == 200
        vectors = [array_of(one["embedding"]) for one in answer["data"]]
        expected = model.encode(texts, truncate_dim=dimensions)
        same(vectors, expected if isinstance(texts, list) else expected[None])

    @pytest.mark.parametrize(
        ("fields", "key", "status", "code"),
        [
            ({"model": "gpt"}, "secret", 404, "model_not_found"),
            ({"dimensions": 5}, "secret", 400, None),
            ({}, "other", 401, "invalid_api_key"),
        ],
    )
    def test_errors(
        self, server: Server, fields: dict[str, Any], key: str, status: int, code: str | None
    ) -> None:
        found, answer = self.ask(server, {"model": "bundle:code", "input": "w1"} | fields, key)
        assert (found, answer["error"]["code"]) == (status, code)
