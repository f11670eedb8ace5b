"""A server in tests: its application in this process, called over ASGI."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray

for package in ("httptools", "httpx", "orjson", "prometheus_client", "starlette", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[dev]'")

import httpx  # noqa: E402 - what is missing skips the tests

from embedge.runtime.server.app import Service  # noqa: E402
from embedge.runtime.server.keys import Keys  # noqa: E402
from embedge.runtime.server.limits import Limits  # noqa: E402
from embedge.runtime.server.models import Models, source_of  # noqa: E402

__all__ = ["Client", "Http", "Models", "array_of", "error_of", "served", "source_of", "vectors_in"]

Http = httpx.AsyncClient
Scenario = Callable[[Http], Awaitable[Any]]


class Client:
    """Calls a service's application, all calls on one event loop."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._runner.close()

    def run(self, scenario: Scenario) -> Any:
        """What ``await scenario(http)`` gives."""

        async def within() -> Any:
            transport = httpx.ASGITransport(app=self.service.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
                return await scenario(http)

        return self._runner.run(within())

    def get(self, path: str, **options: Any) -> httpx.Response:
        response: httpx.Response = self.run(lambda http: http.get(path, **options))
        return response

    def post(self, path: str = "/v1/embeddings", **options: Any) -> httpx.Response:
        response: httpx.Response = self.run(lambda http: http.post(path, **options))
        return response

    def embed(self, value: Any, model: str = "bundle", **fields: Any) -> httpx.Response:
        """The response to a request for embeddings."""
        return self.post(json={"model": model, "input": value, **fields})

    def rerank(self, query: Any, documents: Any, model: str, **fields: Any) -> httpx.Response:
        body = {"model": model, "query": query, "documents": documents, **fields}
        return self.post("/v1/rerank", json=body)


def served(
    *bundles: str,
    keys: tuple[str, ...] = (),
    verify: str = "size",
    local: bool = False,
    **limits: int,
) -> Client:
    """A client of some bundles, as the command names them."""
    models = Models([source_of(bundle) for bundle in bundles], options={"verify": verify})
    return Client(Service(models, limits=Limits(**limits), keys=Keys(keys), local=local))


def array_of(embedding: str | list[Any]) -> NDArray[np.float32]:
    """A vector as an answer has it, by its digits or its bytes."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), "<f4")
    return np.array(embedding, np.float32)


def vectors_in(response: httpx.Response) -> list[NDArray[np.float32]]:
    """The vectors of an answer, in their places."""
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return [array_of(one["embedding"]) for one in data]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """An answer's error, in OpenAI's form."""
    assert response.status_code == status, response.text
    document = response.json()
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = document["error"]
    return error
