"""The command as a program: its help, its errors, its standard streams."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embedge.runtime import EmbedgeError, __version__
from embedge.runtime.cli import embed as embed_module
from embedge.runtime.cli.main import main
from tests.helpers.command import Capture, error_line, program, vectors_of


class TestProgram:
    def test_version(self, capsys: Capture) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"embedge {__version__}\n"

    def test_help_lists_the_commands(self, capsys: Capture) -> None:
        assert main(["--help"]) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in ("export", "embed", "inspect", "bench"))

    @pytest.mark.parametrize("arguments", [[], ["bogus"], ["embed"], ["inspect", "a", "b"]])
    def test_a_call_without_sense_is_exit_code_2(
        self, arguments: list[str], capsys: Capture
    ) -> None:
        assert main(arguments) == 2
        assert error_line(capsys).startswith("embedge: error: ")

    def test_a_missing_package_of_another_part_names_the_extra(
        self, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        def missing(name: str) -> ModuleType:
            raise ModuleNotFoundError(f"No module named {name!r}", name="scipy.special")

        monkeypatch.setattr(importlib, "import_module", missing)
        assert main(["export", "--help"]) == 1
        assert error_line(capsys) == (
            "embedge: error: `embedge export` needs scipy.special, which cannot be imported; "
            'run `pip install "scipy>=1.11,<2"`'
        )

    def test_commands_of_other_parts_are_called_with_their_arguments(
        self, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        def run(args: Any) -> int:
            raise EmbedgeError(f"two\n  lines of {args.source}\n")

        module = SimpleNamespace(
            add_arguments=lambda parser: parser.add_argument("source"), run=run
        )
        asked: list[str] = []

        def imported(name: str) -> Any:
            asked.append(name)
            return module

        monkeypatch.setattr(importlib, "import_module", imported)
        assert main(["bench", "model"]) == 1
        assert asked == ["embedge.runtime.cli.bench"]
        assert error_line(capsys) == "embedge: error: two; lines of model"

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (RuntimeError("odd"), "unexpected RuntimeError: odd (EMBEDGE_TRACEBACK=1 shows where)"),
            (OSError(28, "No space left on device", "/x"), "/x: No space left on device"),
        ],
        ids=["bug", "full disk"],
    )
    def test_no_failure_is_a_traceback(
        self, bundle: Any, monkeypatch: pytest.MonkeyPatch, capsys: Capture, error: Any, line: str
    ) -> None:
        def fail(*args: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr(embed_module, "Embedder", fail)
        assert main(["embed", str(bundle.path)]) == 1
        assert error_line(capsys) == f"embedge: error: {line}"


class TestStreams:
    """Whatever a process's standard streams are."""

    @pytest.mark.slow
    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1251", "cp437", "utf-8"])
    def test_any_encoding(self, make_bundle: Any, tmp_path: Path, encoding: str) -> None:
        tiny = make_bundle("für 愛", prompts={"query": "質問 — "})
        calls = [
            ["inspect", str(tiny.path), "--layers"],
            ["prepare", str(tiny.path), "--pack-only"],
        ]
        calls += [[command, "--help"] for command in ("embed", "export", "bench")]
        for call in calls:
            done = program(call, stdout=subprocess.PIPE, PYTHONIOENCODING=encoding)
            assert (done.returncode, done.stderr) == (0, b""), call
        missing = tmp_path / "愛"
        done = program(["inspect", str(missing)], PYTHONIOENCODING=encoding)
        assert done.returncode == 1
        assert done.stderr.startswith(b"embedge: error: ")

    def run(self, redirections: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        path = os.pathsep.join(path for path in sys.path if path)
        return subprocess.run(
            [
                *("sh", "-c", f'exec "$@" {redirections}', "sh"),
                *(sys.executable, "-m", "embedge.runtime", *arguments),
            ],
            env={**os.environ, "PYTHONPATH": path},
            input=b"w1\n",
            capture_output=True,
            timeout=60,
            check=False,
        )

    @pytest.mark.slow
    def test_closed_standard_input(self, bundle: Any, tmp_path: Path) -> None:
        done = self.run("<&-", "embed", str(bundle.path))
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr == (
            b"embedge: error: standard input is closed; name a file with --input FILE\n"
        )
        (tmp_path / "in").write_text("w1\n")
        done = self.run("<&-", "embed", str(bundle.path), "--input", str(tmp_path / "in"))
        assert vectors_of(done.stdout.decode()).shape == (1, 8)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["out.npy", "out.jsonl"])
    def test_closed_standard_output(self, bundle: Any, tmp_path: Path, name: str) -> None:
        target = tmp_path / name
        for closed in (">&-", "2>&-", ">&- 2>&-"):
            done = self.run(closed, "embed", str(bundle.path), "--output", str(target))
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
            if name == "out.npy":
                assert np.load(target).shape == (1, 8)
            else:
                assert vectors_of(target.read_text()).shape == (1, 8)
            target.unlink()

    @pytest.mark.slow
    def test_closed_standard_output_without_a_file(self, bundle: Any) -> None:
        done = self.run(">&-", "embed", str(bundle.path))
        assert done.returncode == 1
        assert done.stderr == (
            b"embedge: error: standard output is closed; name a file with --output FILE\n"
        )
        for command in ("inspect", "prepare"):
            assert self.run("<&- >&- 2>&-", command, str(bundle.path)).returncode == 0

    @pytest.mark.slow
    def test_closed_standard_error_takes_messages_that_output_does_not_get(
        self, bundle: Any
    ) -> None:
        done = self.run("2>&-", "embed", str(bundle.path), "--task", "nothing")
        assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("command", ["export", "embed", "prepare", "inspect", "bench"])
def test_help_ends_with_examples_that_parse(
    command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "bench":
        pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    module = importlib.import_module(f"embedge.runtime.cli.{command}")
    called: list[Any] = []

    def run(args: Any) -> int:
        called.append(args)
        return 0

    monkeypatch.setattr(module, "run", run)
    examples = text.partition("examples:\n")[2].splitlines()
    assert len(examples) >= 3
    for example in examples:
        words = example.rpartition("| ")[2].split("<")[0].split(">")[0].split()
        assert words[:2] == ["embedge", command]
        assert main(words[1:]) == 0, example
    assert len(called) == len(examples)


def test_unknown_options_point_to_the_help_of_their_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", "bundle", "--depth", "2"]) == 2
    assert "unrecognized arguments: --depth 2; `embedge inspect --help`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "memory ran out; end other programs, or ask for less at once"),
        (RuntimeError("can't start new thread"), "can't start new thread; allow more processes"),
    ],
)
def test_what_the_machine_lacks_is_named(
    error: Exception,
    message: str,
    bundle: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(embed_module, "Embedder", lambda *_, **__: (_ for _ in ()).throw(error))
    assert main(["embed", str(bundle.path)]) == 1
    assert message in capsys.readouterr().err
