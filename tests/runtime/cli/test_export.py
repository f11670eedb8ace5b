"""``embedge export``: what it prints, and how it fails."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from embedge.export.writing import graph_files, precision
from embedge.runtime.cli.main import main
from embedge.runtime.host.progress import LogLines
from tests.helpers.models import make_model, save, save_adapter


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("bert"), tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def adapters(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with several adapters."""
    root = tmp_path_factory.mktemp("adapters")
    for name in ("code", "retrieval"):
        save_adapter(source, root / name, target=["query"])
    return root


def run(*arguments: str | Path) -> int:
    return main(["export", *map(str, arguments), "--calibration", "none"])


def manifest(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "manifest.json").read_text("utf-8"))
    return document


@pytest.mark.slow
def test_a_success_prints_the_cost_of_every_task_and_the_size(
    source: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tasks = [f"--adapter=code={adapters / 'code'}", "--no-adapter", "plain"]
    assert run(source, *tasks, "--precision", "int8", "fp32", "--out", out) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = ["int8/code", "int8/plain", "fp32/code", "fp32/plain"]
    assert [line.split(":")[0] for line in lines[:-1]] == steps
    assert all(" s, peak " in line and line.endswith("MB anonymous memory") for line in lines[:-1])
    assert lines[-1].startswith(f"wrote {out} (")


def test_a_task_that_is_done_is_told_before_the_next_one(
    source: Path,
    adapters: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = graph_files.write_graph

    def fail_at_plain(path: Path, *arguments: Any) -> None:
        if path.stem == "plain":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *arguments)

    monkeypatch.setattr(precision, "write_graph", fail_at_plain)
    tasks = [f"--adapter=code={adapters / 'code'}", "--no-adapter", "plain"]
    assert run(source, *tasks, "--out", tmp_path / "out") == 1
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("int8/code: ")


@pytest.mark.slow
def test_a_log_gets_a_line_now_and_then(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LogLines.__init__, "__defaults__", (0.0,))
    assert run(source, "--no-adapter", "plain", "--out", tmp_path / "out") == 0
    licence, *said = capsys.readouterr().err.splitlines()
    assert licence == "embedge: licence of tiny: not stated"
    assert len(said) > 3
    assert all(line.startswith("embedge: int8/plain: ") for line in said)
    shares = [int(line.split("int8/plain: ")[1].split("%")[0]) for line in said]
    assert shares == sorted(shares)
    assert run(source, "--no-adapter", "plain", "--out", tmp_path / "quiet", "--quiet") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_the_size_is_that_of_the_bundle_without_what_prepare_made(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(source, "--no-adapter", "plain", "--out", out, "--quiet") == 0
    (out / "prepared").mkdir()
    (out / "prepared/graph.bin").write_bytes(bytes(5_000_000))
    capsys.readouterr()
    assert run(source, "--no-adapter", "other", "--out", out, "--quiet") == 0
    size = sum(entry["size"] for entry in manifest(out)["files"].values())
    assert f"wrote {out} ({size / 1e6:.1f} MB)" in capsys.readouterr().out
    assert size < 5_000_000


def test_int8_is_what_is_written_where_no_precision_is_named(source: Path, tmp_path: Path) -> None:
    assert run(source, "--no-adapter", "plain", "--out", tmp_path / "out", "--quiet") == 0
    assert list(manifest(tmp_path / "out")["precisions"]) == ["int8"]


def test_options_reach_the_bundle(source: Path, adapters: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--matryoshka", "8,16", "--int4-block-size", "16", "--keep", "*.dense=fp32"]
    folder = f"--adapter=retrieval={adapters}"  # which holds several
    assert run(source, folder, "--precision", "int4", *options, "--out", out) == 0
    document = manifest(out)
    assert document["model"]["matryoshka_dims"] == [8, 16, 32]
    stated = document["precisions"]["int4"]["options"]
    assert stated == {
        "calibration": "none",
        "keep": {"*.dense": "fp32"},
        "rotation": False,
        "block_size": 16,
        "method": "rtn",
    }
    assert document["tasks"]["retrieval"]["adapter"]["name"] == "retrieval"


WRONG_CALLS = {
    "no task": ([], "--adapter NAME=FOLDER"),
    "no folder": (["--adapter", "code"], "NAME=FOLDER"),
    "a task given twice": (["--no-adapter", "a", "--no-adapter", "a"], "task 'a' is given twice"),
    "precision": (["--no-adapter", "a", "--precision", "int5"], "'int5'"),
    "dimensions": (["--no-adapter", "a", "--matryoshka", "8,x"], "--matryoshka '8,x'"),
    "keep": (["--no-adapter", "a", "--keep", "x"], "PATTERN=PRECISION"),
    "block size": (["--no-adapter", "a", "--int4-block-size", "5"], "--int4-block-size 5"),
    "int4 method": (["--no-adapter", "a", "--int4-method", "awq"], "--int4-method 'awq'"),
    "modality": (["--no-adapter", "a", "--modality", "audio"], "modality 'audio'"),
    "an unknown option": (["--no-adapter", "a", "--fast"], "--fast"),
}


@pytest.mark.parametrize("what", WRONG_CALLS)
def test_a_wrong_call_exits_with_2_and_one_line(
    what: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = WRONG_CALLS[what]
    assert run(source, *arguments, "--out", tmp_path / "out") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("embedge: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_missing_source_exits_with_1_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "nowhere", "--no-adapter", "a", "--out", tmp_path / "out") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "nowhere: no such folder" in line


def test_a_missing_adapter_exits_with_1_and_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, f"--adapter=a={tmp_path / 'none'}", "--out", tmp_path / "out") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "adapter_config.json" in line


def test_a_full_disk_exits_with_1_and_one_line(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(precision, "write_graph", refuse)
    assert run(source, "--no-adapter", "a", "--out", tmp_path / "out", "--quiet") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert list(tmp_path.iterdir()) == []
