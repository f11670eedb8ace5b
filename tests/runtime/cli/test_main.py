"""The command as a program: its help, its errors, its standard streams."""

from __future__ import annotations

import importlib.util
import io
import json
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
from tests.helpers.command import Capture, error_line, vectors_of


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


CALLS = """
import contextlib, json, os, sys
from embedge.runtime.cli.main import main
from embedge.runtime.tuning import autotune

autotune._ROUNDS = 1
streams = sys.stdin, sys.stdout, sys.stderr
for number, call in enumerate(json.loads(sys.argv[1])):
    sys.stdin, sys.stdout, sys.stderr = streams
    for stream in range(3):
        if streams[stream] is None:  # the command before opened something in its place
            with contextlib.suppress(OSError):
                os.close(stream)
    code = main(call)
    if code:
        sys.exit(10 * number + code)
"""


def calls(*commands: list[str]) -> list[str]:
    """A program of several commands, each of which finds the streams that the program got.

    The first that fails ends it, with its code and ten times the number of those before.
    """
    return [sys.executable, "-c", CALLS, json.dumps(commands)]


class TestStreams:
    """Whatever a process's standard streams are."""

    @pytest.fixture
    def commands(self, make_bundle: Any, tmp_path: Path) -> list[list[str]]:
        """Those that print what their bundle holds, and as the last one an error."""
        tiny = make_bundle("für 愛", prompts={"query": "質問 — "})
        bench = ["bench"] if importlib.util.find_spec("matplotlib") else []  # not without torch
        return [
            ["inspect", str(tiny.path), "--layers"],
            ["prepare", str(tiny.path), "--pack-only"],
            *([command, "--help"] for command in ("embed", "export", *bench)),
            ["inspect", str(tmp_path / "愛")],  # is not there
        ]

    @pytest.mark.slow
    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1251", "cp437", "utf-8"])
    def test_any_encoding(
        self, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, encoding: str
    ) -> None:
        for command in commands:
            for name in ("stdout", "stderr"):
                monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
            code, errors = main(command), self.written(sys.stderr)
            if command is commands[-1]:
                assert code == 1
                assert errors.startswith(b"embedge: error: ")
            else:
                assert (code, errors) == (0, b""), command
                assert self.written(sys.stdout)

    def written(self, stream: Any) -> bytes:
        stream.flush()
        return bytes(stream.buffer.getvalue())

    @pytest.mark.slow
    def test_a_process_that_prints_ascii(self, commands: list[list[str]]) -> None:
        done = self.run("", *calls(*commands), PYTHONIOENCODING="ascii")
        assert done.returncode == 10 * (len(commands) - 1) + 1
        [line] = done.stderr.splitlines()
        assert line.startswith(b"embedge: error: ")
        assert b"\\u8cea\\u554f" in done.stdout

    def run(
        self, redirections: str, *program: str, **variables: str
    ) -> subprocess.CompletedProcess[bytes]:
        path = os.pathsep.join(path for path in sys.path if path)
        return subprocess.run(
            ["sh", "-c", f'exec "$@" {redirections}', "sh", *program],
            env={**os.environ, "PYTHONPATH": path, **variables},
            input=b"w1\n",
            capture_output=True,
            timeout=600,
            check=False,
        )

    @pytest.mark.slow
    def test_closed_standard_input(self, bundle: Any, tmp_path: Path) -> None:
        (tmp_path / "in").write_text("w1\n")
        embed = ["embed", str(bundle.path)]
        done = self.run("<&-", *calls([*embed, "--input", str(tmp_path / "in")], embed))
        assert done.returncode == 11
        assert done.stderr == (
            b"embedge: error: standard input is closed; name a file with --input FILE\n"
        )
        assert vectors_of(done.stdout.decode()).shape == (1, 8)

    @pytest.mark.slow
    @pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
    def test_closed_standard_output(self, bundle: Any, tmp_path: Path, closed: str) -> None:
        (tmp_path / "in").write_text("w1\n")
        lines, array = tmp_path / "out.jsonl", tmp_path / "out.npy"
        embed = ["embed", str(bundle.path), "--output"]
        first = [*embed, str(lines), "--input", str(tmp_path / "in")]
        done = self.run(closed, *calls(first, [*embed, str(array)]))
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert np.load(array).shape == vectors_of(lines.read_text()).shape == (1, 8)

    @pytest.mark.slow
    def test_closed_standard_output_without_a_file(self, bundle: Any) -> None:
        done = self.run(">&-", *calls(["embed", str(bundle.path)]))
        assert done.returncode == 1
        assert done.stderr == (
            b"embedge: error: standard output is closed; name a file with --output FILE\n"
        )
        commands = [[command, str(bundle.path)] for command in ("inspect", "prepare")]
        assert self.run("<&- >&- 2>&-", *calls(*commands)).returncode == 0

    @pytest.mark.slow
    def test_closed_standard_error_takes_messages_that_output_does_not_get(
        self, bundle: Any
    ) -> None:
        done = self.run("2>&-", *calls(["embed", str(bundle.path), "--task", "nothing"]))
        assert (done.returncode, done.stdout) == (2, b"")

    @pytest.mark.slow
    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has /dev/full")
    @pytest.mark.parametrize("buffered", ["", "1"])
    def test_full_standard_error_changes_no_exit_code(self, bundle: Any, buffered: str) -> None:
        call = [sys.executable, "-m", "embedge", "embed", str(bundle.path)]
        for arguments, code in (([], 0), (["--task", "nothing"], 2), (["--input", "missing"], 1)):
            done = self.run("2>/dev/full", *call, *arguments, PYTHONUNBUFFERED=buffered)
            assert (done.returncode, done.stderr) == (code, b""), arguments
            assert bool(done.stdout) == (code == 0)


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
    module = importlib.import_module(f"embedge.runtime.cli.{command.replace('-', '_')}")
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
