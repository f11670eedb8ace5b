"""The command writes of which kind vectors are, and refuses to make others."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from embedge.runtime import Embedder
from embedge.runtime.cli.main import main
from tests.helpers.command import Capture, SetStdin, error_line, program


@pytest.mark.parametrize("output", ["vectors.npy", "vectors.jsonl"])
def test_it_goes_into_a_file_of_its_own(
    output: str, two_tasks: Any, tmp_path: Path, stdin: SetStdin
) -> None:
    stdin(b"w1\n")
    call = [
        "embed",
        str(two_tasks.path),
        "--precision",
        "fp32",
        "--task",
        "code",
        "--truncate-dim",
        "4",
    ]
    call += ["--prompt-name", "passage", "--output", str(tmp_path / output)]
    assert main([*call, "--fingerprint", str(tmp_path / "kind.json")]) == 0
    written = json.loads((tmp_path / "kind.json").read_text("utf-8"))
    model = Embedder(two_tasks.path, precision="fp32", task="code")
    options: dict[str, Any] = {"truncate_dim": 4, "prompt_name": "passage"}
    assert written == {
        "fingerprint": model.fingerprint(**options),
        "parts": model.fingerprint_parts(**options),
    }
    for expected in (written["fingerprint"], str(tmp_path / "kind.json")):
        stdin(b"w1\n")
        assert main([*call, "--expect", expected]) == 0
    model.check_fingerprint(written, **options)


def test_images_have_no_prompt_in_it(with_images: Any, tmp_path: Path, stdin: SetStdin) -> None:
    stdin(b"")
    call = [
        "embed",
        str(with_images.path),
        "--task",
        "code",
        "--images",
        "--output",
        str(tmp_path / "v"),
    ]
    assert main([*call, "--fingerprint", str(tmp_path / "kind.json")]) == 0
    assert json.loads((tmp_path / "kind.json").read_text("utf-8"))["parts"]["prompt"] == ""


def test_vectors_of_another_kind_are_refused_before_anything_is_written(
    two_tasks: Any, tmp_path: Path, stdin: SetStdin, capsys: Capture
) -> None:
    stdin(b"w1\n")
    stored = Embedder(two_tasks.path, precision="int4", task="code").fingerprint()
    out, kind = tmp_path / "vectors.npy", tmp_path / "kind.json"
    call = [
        "embed",
        str(two_tasks.path),
        "--precision",
        "fp32",
        "--task",
        "code",
        "--output",
        str(out),
    ]
    assert main([*call, "--expect", stored, "--fingerprint", str(kind)]) == 1
    assert error_line(capsys).startswith(
        f"embedge: error: expected vectors of the fingerprint {stored}, found e1:"
    )
    assert not out.exists()
    assert not kind.exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ["--expect", "nowhere.json"],
            1,
            "--expect nowhere.json: expected e1:… or a file that --fingerprint wrote",
        ),
        (["--expect", "e7:0123456789abcdef"], 2, "is a fingerprint of form e7"),
        (["--fingerprint", "-"], 2, "--fingerprint -: expected a file of its own"),
        (
            ["--output", "v", "--fingerprint", "./v"],
            2,
            "--fingerprint ./v: expected a file of its own",
        ),
    ],
)
def test_what_cannot_be_used_is_said(
    options: list[str],
    code: int,
    message: str,
    bundle: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stdin: SetStdin,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    stdin(b"w1\n")
    assert main(["embed", str(bundle.path), *options]) == code
    assert message in error_line(capsys)


def test_inspect_lists_them(copy_with_contents: Path, capsys: Capture) -> None:
    expected = Embedder(copy_with_contents, precision="fp32", task="code").fingerprint()
    assert main(["inspect", str(copy_with_contents)]) == 0
    assert f"fp32       code       {expected}" in capsys.readouterr().out
    assert main(["inspect", str(copy_with_contents), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["fingerprints"]) == ["fp32", "int4"]
    assert document["fingerprints"]["fp32"]["code"] == expected


@pytest.fixture
def copy_with_contents(two_tasks: Any) -> Path:
    """A bundle as exports write it from format 1.5 on."""
    models = {p: Embedder(two_tasks.path, precision=p) for p in ("fp32", "int4")}
    contents = {
        p: {task: model.fingerprint_parts(task=task)["graph"] for task in model.tasks}
        for p, model in models.items()
    }
    two_tasks.edit(
        lambda m: [m["precisions"][p].update(content_sha256=by) for p, by in contents.items()]
    )
    path: Path = two_tasks.path
    return path


@pytest.mark.slow
def test_another_process_finds_the_same(copy_with_contents: Path) -> None:
    found = []
    for seed in ("1", "2"):
        done = program(
            ["inspect", str(copy_with_contents), "--json"],
            PYTHONHASHSEED=seed,
            stdout=subprocess.PIPE,
        )
        found.append(json.loads(done.stdout)["fingerprints"])
    expected = {
        p: {
            t: Embedder(copy_with_contents, precision=p).fingerprint(task=t)
            for t in ("retrieval", "code")
        }
        for p in ("fp32", "int4")
    }
    assert found == [expected, expected]


def test_inspect_lists_none_for_older_bundles(two_tasks: Any, capsys: Capture) -> None:
    assert main(["inspect", str(two_tasks.path)]) == 0
    assert "fingerprint" not in capsys.readouterr().out
