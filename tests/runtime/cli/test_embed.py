"""``embedge embed``: what comes in, what goes out, what is said meanwhile."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder, EmbedgeWarning
from embedge.runtime.cli import embed as embed_module
from embedge.runtime.cli.main import main
from embedge.runtime.cli.vector_output import _JsonlWriter
from tests.helpers.command import Capture, CaptureBytes, SetStdin, error_line, program, vectors_of


class TestEmbed:
    def test_lines_become_vectors_in_their_order_exactly(
        self, bundle: Any, stdin: SetStdin, capsys: Capture
    ) -> None:
        stdin(b"w1\nw2 w3\r\n\nw4")
        assert main(["embed", str(bundle.path)]) == 0
        out = capsys.readouterr()
        expected = Embedder(bundle.path).encode(["w1", "w2 w3", "", "w4"])
        np.testing.assert_array_equal(vectors_of(out.out), expected)
        assert out.err == ""

    def test_jsonl_keeps_the_other_members(
        self, bundle: Any, tmp_path: Path, capsys: Capture
    ) -> None:
        source = tmp_path / "in.jsonl"
        source.write_text('{"id": 7, "body": "w1", "embedding": 0}\n{"body": "w2", "ü": "é"}\n')
        assert main(["embed", str(bundle.path), "--input", str(source), "--field", "body"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [list(row) for row in rows] == [["id", "embedding"], ["ü", "embedding"]]
        assert rows[0]["id"] == 7
        np.testing.assert_array_equal(
            np.array(rows[1]["embedding"], np.float32), Embedder(bundle.path).encode("w2")
        )

    @pytest.mark.parametrize("texts", [0, 1, 57])
    def test_npy_has_every_row_whatever_the_chunks(
        self, bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: int
    ) -> None:
        monkeypatch.setattr(embed_module, "_CHUNK_TEXTS", 10)
        lines = [f"w{i % 60}" for i in range(texts)]
        (tmp_path / "in").write_text("".join(f"{line}\n" for line in lines))
        target = tmp_path / "out.npy"
        arguments = ["--input", str(tmp_path / "in"), "--output", str(target), "--batch-size", "4"]
        assert main(["embed", str(bundle.path), *arguments]) == 0
        vectors = np.load(target)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, Embedder(bundle.path).encode(lines), atol=1e-6, rtol=0)

    def test_a_chunk_is_written_while_the_next_one_is_embedded(
        self, bundle: Any, stdin: SetStdin, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(embed_module, "_CHUNK_TEXTS", 2)
        second = threading.Event()
        encode, write = Embedder.encode, _JsonlWriter.write

        def encoding(self: Embedder, texts: Any, **options: Any) -> Any:
            if texts == ["w3", "w4"]:
                second.set()
            return encode(self, texts, **options)

        def writing(self: _JsonlWriter, *arguments: Any) -> None:
            assert second.wait(timeout=10)
            write(self, *arguments)

        monkeypatch.setattr(Embedder, "encode", encoding)
        monkeypatch.setattr(_JsonlWriter, "write", writing)
        stdin(b"w1\nw2\nw3\nw4\nw5\n")
        assert main(["embed", str(bundle.path), "--batch-size", "2"]) == 0
        monkeypatch.undo()
        expected = Embedder(bundle.path).encode([f"w{i}" for i in range(1, 6)])
        found = vectors_of(capsys.readouterr().out)
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("texts", [1, 3])
    def test_a_chunk_that_cannot_be_written_fails_the_command_and_nothing_is_left(
        self,
        bundle: Any,
        tmp_path: Path,
        stdin: SetStdin,
        capsys: Capture,
        monkeypatch: pytest.MonkeyPatch,
        texts: int,
    ) -> None:
        def full(self: _JsonlWriter, *arguments: Any) -> None:
            raise OSError(28, "no space left on device")

        before = set(tmp_path.iterdir())
        monkeypatch.setattr(embed_module, "_CHUNK_TEXTS", 1)
        monkeypatch.setattr(_JsonlWriter, "write", full)
        stdin(b"w1\n" * texts)
        call = ["embed", str(bundle.path), "--output", str(tmp_path / "v"), "--batch-size", "1"]
        assert main(call) == 1
        assert "no space left on device" in error_line(capsys)
        assert set(tmp_path.iterdir()) == before
        assert not [t for t in threading.enumerate() if t.name.startswith("embedge-write")]

    @pytest.mark.slow
    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ("embed BUNDLE", "standard output"),
            ("embed BUNDLE --format npy", "standard output"),
            ("embed BUNDLE --output /dev/full", "--output /dev/full"),
            ("inspect BUNDLE", "standard output"),
        ],
    )
    def test_a_full_disk_names_what_could_not_be_written(
        self, bundle: Any, arguments: str, named: str
    ) -> None:
        """The real program, whose interpreter would complain at exit of what it could not flush."""
        call = [str(bundle.path) if word == "BUNDLE" else word for word in arguments.split()]
        with open("/dev/full", "wb") as full:
            done = program(call, input=b"w1\n", stdout=full, PYTHONUNBUFFERED="")
        assert done.stderr.decode() == (
            f"embedge: error: {named}: No space left on device; make room, or write to another "
            "place\n"
        )
        assert done.returncode == 1

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform == "win32", reason="sizes of files are limited by resource")
    @pytest.mark.parametrize("most", [100, 20_000])
    @pytest.mark.parametrize("piped", [True, False])
    def test_a_full_folder_is_named_with_the_way_out(
        self, bundle: Any, tmp_path: Path, piped: bool, most: int
    ) -> None:
        def limit() -> None:
            import resource
            import signal

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        target = tmp_path / "v.npy"
        call = ["embed", str(bundle.path), *(["--format", "npy"] if piped else [])]
        done = program(
            call if piped else [*call, "--output", str(target)],
            input=b"w1\n" * (most // 10),
            stdout=subprocess.PIPE,
            preexec_fn=limit,
            TMPDIR=str(tmp_path),
        )
        assert done.stderr.decode() == "embedge: error: " + (
            f"{tmp_path}, where .npy is collected before it goes to standard output: File too large; "
            "name a roomier folder in TMPDIR, or give --output FILE\n"
            if piped
            else f"--output {target}: File too large; make room, or write to another place\n"
        )
        assert done.returncode == 1
        assert not list(tmp_path.glob("*.npy*"))

    def test_npy_goes_through_a_pipe(
        self, bundle: Any, stdin: SetStdin, capsysbinary: CaptureBytes
    ) -> None:
        stdin(b"w1\nw2\n")
        assert main(["embed", str(bundle.path), "--format", "npy"]) == 0
        vectors = np.load(io.BytesIO(capsysbinary.readouterr().out))
        np.testing.assert_array_equal(vectors, Embedder(bundle.path).encode(["w1", "w2"]))

    def test_options_reach_the_embedder(
        self, two_tasks: Any, stdin: SetStdin, capsys: Capture
    ) -> None:
        stdin(b"w1 w2\n")
        options = "--task code --precision int4 --prompt-name passage --truncate-dim 4"
        more = "--normalize --max-batch-tokens 64 --device cpu --threads 1 --on-truncate error"
        assert main(["embed", str(two_tasks.path), *options.split(), *more.split()]) == 0
        expected = Embedder(two_tasks.path, precision="int4").encode(
            ["w1 w2"], task="code", prompt_name="passage", truncate_dim=4
        )
        np.testing.assert_allclose(vectors_of(capsys.readouterr().out), expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize(
        ("data", "arguments", "message"),
        [
            (b"w1\nw\xff2\n", [], "input line 2: not UTF-8 (invalid start byte at byte 1)"),
            (
                b'{"text": "w1"}\n[1]\n',
                ["--input-format", "jsonl"],
                "input line 2: expected a JSON",
            ),
            (b'{"text": "w1"}\n\n', ["--input-format", "jsonl"], "input line 2: expected a JSON"),
            (b'{"id": 1}\n', ["--field", "t"], "expected a string under 't', found no such key"),
            (
                b'{"t": 1}\n',
                ["--field", "t"],
                "input line 1: expected a string under 't', found int",
            ),
            (
                b'{"text": "w1"}\n{"text": "w2", "x": [NaN]}\n',
                ["--input-format", "jsonl"],
                "(NaN is no JSON; write null)",
            ),
            (
                b'{"text": "w1", "x": -1e999}\n',
                ["--input-format", "jsonl"],
                "(-1e999 is larger than a float can be",
            ),
            (
                b"w1\n" + b"w1 " * 20,
                ["--on-truncate", "error"],
                "input line 2 is longer than 16 tok",
            ),
        ],
        ids=[
            *("UTF-8", "no object", "blank", "no key", "no string"),
            *("NaN", "large number", "too long"),
        ],
    )
    def test_a_line_that_cannot_be_used_is_named_and_nothing_is_left(
        self,
        bundle: Any,
        tmp_path: Path,
        stdin: SetStdin,
        capsys: Capture,
        data: bytes,
        arguments: list[str],
        message: str,
    ) -> None:
        stdin(data)
        folder = tmp_path / "out"
        folder.mkdir()
        call = ["embed", str(bundle.path), "--output", str(folder / "v.jsonl"), *arguments]
        assert main(call) == 1
        assert message in error_line(capsys)
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--task", "x"], "no task 'x'; it has retrieval"),
            (["--precision", "int2"], "no precision 'int2'; it has fp32"),
            (["--truncate-dim", "99"], "error: --truncate-dim is 99; the bundle has 1 to 8"),
            (
                ["--prompt-name", "query"],
                "no prompt 'query': it declares none; leave --prompt-name out",
            ),
            (["--batch-size", "0"], "error: --batch-size is 0; expected a whole number"),
            (["--threads", "0"], "error: --threads is 0; expected a whole number"),
            (
                ["--min-cosine", "0.9"],
                "--min-cosine goes with --precision auto, which chooses by it",
            ),
            (
                ["--precision", "auto", "--memory-limit", "10"],
                "bytes, above --memory-limit (10)",
            ),
            (["--batch-size", "x"], "argument --batch-size: invalid int value: 'x'"),
            (["--device", "tpu"], "--device is 'tpu'; expected one of auto, cpu, cuda, or cuda:N"),
            (["--field", "a", "--input-format", "lines"], "--field is for JSONL"),
            (["--what"], "unrecognized arguments: --what"),
        ],
    )
    def test_a_wrong_call_is_one_line_and_exit_code_2(
        self, bundle: Any, capsys: Capture, arguments: list[str], message: str
    ) -> None:
        assert main(["embed", str(bundle.path), *arguments]) == 2
        line = error_line(capsys)
        assert line.startswith("embedge: error: ")
        assert message in line

    def test_what_has_to_be_chosen_is_asked_for_by_option(
        self, two_tasks: Any, capsys: Capture
    ) -> None:
        assert main(["embed", str(two_tasks.path)]) == 2
        assert error_line(capsys).endswith(
            "precisions: fp32, int4; choose one, such as --precision fp32, or --precision auto"
        )
        assert main(["embed", str(two_tasks.path), "--precision", "fp32"]) == 2
        assert error_line(capsys).endswith("retrieval, code; choose one, such as --task retrieval")

    def test_names_that_a_user_gave_are_left_as_they_are(
        self, bundle: Any, tmp_path: Path, capsys: Capture
    ) -> None:
        assert main(["embed", str(bundle.path), "--task", "batch_size"]) == 2
        assert "no task 'batch_size'" in error_line(capsys)
        assert main(["embed", str(tmp_path / "batch_size")]) == 1
        assert f"{tmp_path}/batch_size: expected a bundle's folder" in error_line(capsys)

    def test_files_that_cannot_be_opened_are_named(
        self, bundle: Any, tmp_path: Path, stdin: SetStdin, capsys: Capture
    ) -> None:
        stdin(b"w1\n")
        for option in ("--input", "--output"):
            name = str(tmp_path / "nowhere" / "file")
            assert main(["embed", str(bundle.path), option, name]) == 1
            assert (
                error_line(capsys) == f"embedge: error: {option} {name}: No such file or directory"
            )

    def test_an_interrupted_run_leaves_the_old_output(
        self,
        bundle: Any,
        tmp_path: Path,
        stdin: SetStdin,
        capsys: Capture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        target = tmp_path / "v.jsonl"
        target.write_text("old")
        before = set(tmp_path.iterdir())
        monkeypatch.setattr(embed_module, "_CHUNK_TEXTS", 1)
        encode = Embedder.encode

        def interrupted(self: Embedder, texts: Any, **options: Any) -> Any:
            if texts == ["w2"]:
                raise KeyboardInterrupt
            return encode(self, texts, **options)

        monkeypatch.setattr(Embedder, "encode", interrupted)
        stdin(b"w1\nw2\n")
        call = ["embed", str(bundle.path), "--output", str(target), "--batch-size", "1"]
        assert main(call) == 130
        assert error_line(capsys) == "embedge: error: interrupted"
        assert target.read_text() == "old"
        assert set(tmp_path.iterdir()) == before

    def test_the_output_replaces_the_file_behind_a_link(
        self, bundle: Any, tmp_path: Path, stdin: SetStdin
    ) -> None:
        (tmp_path / "real.jsonl").write_text("old")
        (tmp_path / "link.jsonl").symlink_to("real.jsonl")
        stdin(b"w1\n")
        assert main(["embed", str(bundle.path), "--output", str(tmp_path / "link.jsonl")]) == 0
        assert (tmp_path / "link.jsonl").is_symlink()
        assert len(vectors_of((tmp_path / "real.jsonl").read_text())) == 1

    def test_warnings_are_one_line_in_the_words_of_the_command(
        self,
        bundle: Any,
        stdin: SetStdin,
        capsys: Capture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(embed_module, "_CHUNK_TEXTS", 2)
        stdin(b"w1\nw2\nw3\n" + b"w1 " * 20)
        # Warnings are errors in these tests; the command itself leaves Python's defaults.
        monkeypatch.setattr("warnings.filters", [])
        assert main(["embed", str(bundle.path), "--batch-size", "2"]) == 0
        assert error_line(capsys) == (
            "embedge: warning: input line 4 is longer than 16 tokens and was cut; --on-truncate ignore "
            "cuts in silence, --on-truncate error refuses; this is said once"
        )

    @pytest.mark.slow
    def test_a_reader_that_stops_early_is_no_traceback(self, bundle: Any) -> None:
        """The real program, in a process of its own, into a pipe that closes."""
        process = subprocess.Popen(
            [sys.executable, "-m", "embedge.runtime", "embed", str(bundle.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(b"w1\n" * 5000, timeout=600)
        assert err == b""
        assert process.returncode == 1


class TestProgress:
    @pytest.mark.slow
    def test_a_log_gets_a_line_now_and_then(
        self,
        bundle: Any,
        stdin: SetStdin,
        capsys: Capture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        clock = iter(range(10_000))
        monkeypatch.setattr(
            "embedge.runtime.host.progress.time",
            SimpleNamespace(monotonic=lambda: next(clock) * 10.0),
        )
        stdin(b"".join(b"w%d\n" % (i % 60) for i in range(2000)))
        assert main(["embed", str(bundle.path), "--batch-size", "4"]) == 0
        out = capsys.readouterr()
        said = [line for line in out.err.splitlines() if line.startswith("embedge: ")]
        assert len(said) > 5  # though 2,000 texts are two chunks
        assert all(line.endswith(" a second") for line in said)
        counts = [int(line.split()[1].replace(",", "")) for line in said]
        assert counts == sorted(set(counts))
        assert counts[-1] <= 2000
        stdin(b"w1\n" * 100)
        assert main(["embed", str(bundle.path), "--batch-size", "4", "--quiet"]) == 0
        assert capsys.readouterr().err == ""

    def test_a_terminal_gets_a_bar_that_counts_every_text(
        self, bundle: Any, stdin: SetStdin, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        stdin(b"".join(b"w%d\n" % (i % 60) for i in range(1500)))
        assert main(["embed", str(bundle.path), "--output", os.devnull]) == 0
        assert "1500text" in terminal.getvalue()


def test_warnings_that_are_asked_to_be_errors_are_one_line(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.write_text("\n")
    monkeypatch.setattr(
        "embedge.runtime.cli.embed._encode",
        lambda *_: (_ for _ in ()).throw(EmbedgeWarning("input line 1 has no tokens")),
    )
    assert main(["embed", str(bundle.path), "--input", str(texts)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "embedge: error: input line 1 has no tokens"


def test_the_input_is_not_overwritten(
    bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, link = tmp_path / "texts", tmp_path / "link"
    texts.write_text("w1\n")
    link.symlink_to(texts)
    for output in (texts, link):
        assert (
            main(["embed", str(bundle.path), "--input", str(texts), "--output", str(output)]) == 2
        )
        assert "is the input, whose texts would be lost; name another" in capsys.readouterr().err
    assert texts.read_text() == "w1\n"
