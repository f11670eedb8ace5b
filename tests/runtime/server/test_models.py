"""Bundles as the server holds them: opened whole, replaced whole, and closed when nobody uses them."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder
from embedge.runtime.errors import BundleError, EmbedgeValueError
from tests.helpers.pictures import picture
from tests.helpers.serving import Http, Models, served, source_of, vectors_in
from tests.runtime.conftest import MakeBundle, TinyBundle

Caplog = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch


def opened(path: Path, **options: Any) -> Models:
    return Models([source_of(f"bundle={path}")], **options)


def changed(path: Path, version: str = "0.1.9") -> None:
    """Another manifest of the same content, in the place of a bundle's."""
    document = json.loads((path / "manifest.json").read_text())
    document["producer"]["version"] = version
    (path / "new").write_text(json.dumps(document))
    (path / "new").rename(path / "manifest.json")


@pytest.fixture
def closed(monkeypatch: Patch) -> list[Embedder]:
    """The embedders that are closed."""
    found: list[Embedder] = []

    def close(self: Embedder) -> None:
        found.append(self)

    monkeypatch.setattr(Embedder, "close", close)
    return found


def test_a_precision_twice_is_one(copied: Path, closed: list[Embedder]) -> None:
    models = opened(copied, precisions=["fp32", "fp32"])
    assert len(list(models)) == 1
    assert closed == []


def test_auto_is_refused(copied: Path) -> None:
    with pytest.raises(EmbedgeValueError, match="precision is 'auto'; expected names"):
        opened(copied, precisions=["auto"])


def test_a_link_has_its_own_name(copied: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(copied, target_is_directory=True)
    assert source_of(str(link)).name == "current"
    assert source_of(f"{link}/").name == "current"


def test_what_is_replaced_while_it_is_opened_is_not_taken(
    copied: Path, closed: list[Embedder], monkeypatch: Patch
) -> None:
    from embedge.runtime.server.models import ServedModel

    monkeypatch.setattr(ServedModel, "warm_up", lambda self: changed(copied))
    with pytest.raises(BundleError, match="was replaced while it was opened"):
        opened(copied)
    assert len(closed) == 1


def test_whatever_fails_a_reload_keeps_the_old_one(
    copied: Path,
    make_bundle: MakeBundle,
    closed: list[Embedder],
    monkeypatch: Patch,
    caplog: Caplog,
) -> None:
    from embedge.runtime.server.models import ServedModel

    def fails(self: ServedModel) -> None:
        if self.name == "bundle":
            raise RuntimeError("of a library")

    other = make_bundle("other").path
    models = Models([source_of(f"bundle={copied}"), source_of(f"other={other}")])
    before = list(models)
    monkeypatch.setattr(ServedModel, "warm_up", fails)
    for path in (copied, other):
        changed(path)
    replaced = models.reload()
    assert replaced == before[1:]
    assert next(iter(models)) is before[0]
    assert len(closed) == 1 and closed[0] is not before[0].embedder
    [failed] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert failed.getMessage() == "bundle stays as it was"
    assert "of a library" in str(failed.exc_info)


def test_a_model_is_closed_when_its_last_request_is_answered(tasks_bundle: TinyBundle) -> None:
    with served(str(tasks_bundle.path)) as client:
        [model] = client.service._models
        used: list[int] = []
        tokenize = model.embedder.tokenize

        def counted(*arguments: Any, **options: Any) -> Any:
            used.append(model.users)
            return tokenize(*arguments, **options)

        model.embedder.tokenize = counted  # type: ignore[method-assign]

        async def scenario(http: Http) -> None:
            body = {"model": "bundle:code", "input": "w1"}
            await http.post("/v1/embeddings", json=body)
            with model.in_use():
                closing = asyncio.ensure_future(client.service._close(model))
                await asyncio.sleep(0.12)
                assert not closing.done()
            await closing

        client.run(scenario)
    assert used == [1]
    assert model.users == 0


def test_nothing_of_a_folder_is_read_after_its_bundle_was_opened(
    image_bundle: TinyBundle, tmp_path: Path
) -> None:
    pytest.importorskip("PIL")
    image = picture(40, 24)
    expected = Embedder(image_bundle.path).encode([image])
    folder = Path(shutil.copytree(image_bundle.path, tmp_path / "images"))
    [model] = opened(folder)
    shutil.rmtree(folder)
    np.testing.assert_array_equal(model.embedder.encode([image]), expected)


def test_without_pillow_texts_are_served(
    image_bundle: TinyBundle, monkeypatch: Patch, caplog: Caplog
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    with served(str(image_bundle.path)) as client:
        assert len(vectors_in(client.embed("w1", "images"))) == 1
    assert "images takes no images: " in caplog.text
