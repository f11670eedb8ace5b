from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from embedge.bench.errors import BenchError
from embedge.bench.measure.texts import Text
from embedge.bench.studies import bulk
from embedge.export import export_bundle
from embedge.runtime.sessions.session import GraphSession


@pytest.fixture(scope="module")
def bundle(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bulk") / "bundle"
    export_bundle(make_model(), adapters={"plain": None}, precisions=["fp32"], out=out)
    return out


def test_short_texts_are_different_and_always_the_same() -> None:
    texts = bulk.short_texts(500)
    assert len(set(texts)) == 500
    assert all(4 <= len(text.split()) <= 20 for text in texts)
    assert texts == bulk.short_texts(500)
    assert texts != bulk.short_texts(500, seed=1)


def test_more_texts_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "default_texts", lambda: [Text(text="a b " * 12)])
    with pytest.raises(BenchError, match=r"--texts: \d+ different texts can be drawn, not 100"):
        bulk.short_texts(100)


@pytest.mark.slow
def test_shares_are_shares_and_the_runtime_is_left_as_it_was(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = GraphSession.run
    assert bulk.main([str(bundle), "--texts", "700", "--threads", "2", "--rounds", "2"]) == 0
    assert GraphSession.run is before
    *_, last = capsys.readouterr().out.splitlines()
    rounds = json.loads(last)
    assert len(rounds) == 2
    for found in rounds:
        assert (found["texts"], found["threads"]) == (700, 2)
        assert found["runs"] >= 700 / 32  # a batch has 32 texts at most
        assert 0 < found["in_graph"] <= 1
        assert 0 <= found["padding"] < 1
        assert found["seconds"] > 0


def test_a_folder_that_is_no_bundle_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bulk.main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("embedge.bench.studies.bulk: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", ["--texts", "--rounds"])
def test_a_count_below_one_is_a_wrong_call(
    option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        bulk.main([str(tmp_path), option, "0"])
    assert caught.value.code == 2
    assert f"{option}: expected at least 1, found 0" in capsys.readouterr().err
