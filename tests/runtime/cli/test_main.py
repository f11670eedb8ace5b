from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedge.runtime import Embedder, EmbedgeError, EmbedgeWarning, __version__
from embedge.runtime.cli import embed as embed_module
from embedge.runtime.cli.main import main
from embedge.runtime.cli.vector_output import _JsonlWriter

Capture = pytest.CaptureFixture[str]
CaptureBytes = pytest.CaptureFixture[bytes]
SetStdin = Callable[[bytes], None]


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> SetStdin:
    """Sets the bytes of standard input."""

    def replace(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    return replace


def error_line(capsys: Capture) -> str:
    """The one line on standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def vectors_of(jsonl: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array([json.loads(line)["embedding"] for line in jsonl.splitlines()], np.float32)


def program(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Runs the real program; names in capitals are its environment's variables."""
    variables = {name: options.pop(name) for name in list(options) if name.isupper()}
    path = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-m", "embedge.runtime", *arguments],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, **variables},
        timeout=60,
        check=False,
        **options,
    )


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
        _, err = process.communicate(b"w1\n" * 5000, timeout=60)
        assert err == b""
        assert process.returncode == 1


class TestEmbedImages:
    @pytest.fixture
    def paths(self, tmp_path: Path) -> list[Path]:
        generator = np.random.default_rng(0)
        paths = []
        for index, side in enumerate((8, 12, 16)):
            pixels = generator.integers(0, 256, (side, 8, 3)).astype(np.uint8)
            paths.append(tmp_path / f"é {index}.png")
            Image.fromarray(pixels).save(paths[-1])
        return paths

    def test_lines_are_paths(
        self, with_images: Any, paths: list[Path], stdin: SetStdin, capsys: Capture
    ) -> None:
        stdin("".join(f"{path}\n" for path in paths).encode())
        options = ["--images", "--task", "code", "--max-pixels", "100", "--truncate-dim", "4"]
        assert main(["embed", str(with_images.path), *options]) == 0
        expected = Embedder(with_images.path).encode_image(
            paths, task="code", max_pixels=100, truncate_dim=4
        )
        vectors = vectors_of(capsys.readouterr().out)
        np.testing.assert_allclose(vectors, expected, atol=1e-6, rtol=0)

    def test_objects_hold_a_path(
        self, with_images: Any, paths: list[Path], stdin: SetStdin, capsys: Capture
    ) -> None:
        lines = [{"id": index, "image": str(path)} for index, path in enumerate(paths)]
        stdin("\n".join(map(json.dumps, lines)).encode())
        options = ["--images", "--task", "code", "--input-format", "jsonl"]
        assert main(["embed", str(with_images.path), *options]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [list(row) for row in rows] == [["id", "embedding"]] * 3

    def test_npy_has_every_row_whatever_the_chunks(
        self,
        with_images: Any,
        paths: list[Path],
        tmp_path: Path,
        stdin: SetStdin,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(embed_module, "_CHUNK_IMAGES", 2)
        stdin("".join(f"{path}\n" for path in paths * 3).encode())
        target = tmp_path / "out.npy"
        options = ["--images", "--task", "code", "--output", str(target), "--batch-size", "2"]
        assert main(["embed", str(with_images.path), *options]) == 0
        expected = Embedder(with_images.path).encode_image(paths * 3, task="code")
        np.testing.assert_allclose(np.load(target), expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("nowhere.png", "input line 3: nowhere.png: no such file"),
            ("https://example.org/x.png", "input line 3: 'https://example.org/x.png' is a URL"),
            (__file__, "input line 3: expected an image file of a format"),
        ],
        ids=["missing", "URL", "no image"],
    )
    def test_a_bad_image_names_its_line_and_nothing_is_left(
        self,
        with_images: Any,
        paths: list[Path],
        tmp_path: Path,
        stdin: SetStdin,
        capsys: Capture,
        line: str,
        message: str,
    ) -> None:
        stdin(f"{paths[0]}\n{paths[1]}\n{line}\n".encode())
        folder = tmp_path / "out"
        folder.mkdir()
        options = ["--images", "--task", "code", "--output", str(folder / "v.npy")]
        assert main(["embed", str(with_images.path), *options]) == 1
        assert message in error_line(capsys)
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--images", "--prompt-name", "query"], "--prompt-name is for texts"),
            (["--images", "--on-truncate", "warn"], "--on-truncate is for texts"),
            (["--images", "--max-batch-tokens", "9"], "--max-batch-tokens is for texts"),
            (["--images", "--max-pixels", "0"], "error: --max-pixels: expected a positive whole"),
            (["--max-pixels", "99"], "--max-pixels goes with --images"),
        ],
    )
    def test_a_wrong_call_is_one_line_and_exit_code_2(
        self, with_images: Any, capsys: Capture, arguments: list[str], message: str
    ) -> None:
        assert main(["embed", str(with_images.path), "--task", "code", *arguments]) == 2
        assert message in error_line(capsys)

    def test_a_bundle_without_a_vision_tower_is_refused(self, bundle: Any, capsys: Capture) -> None:
        assert main(["embed", str(bundle.path), "--images"]) == 2
        assert "the bundle has no vision tower; it embeds: text" in error_line(capsys)


class TestInspect:
    def test_it_shows_what_happens_to_images(self, with_images: Any, capsys: Capture) -> None:
        assert main(["inspect", str(with_images.path), "--verify"]) == 0
        out = capsys.readouterr().out
        assert "takes         text, image" in out
        assert "images        scaled to 16 to 800 pixels, 4² of them a token" in out

    def test_it_shows_what_the_bundle_holds(self, two_tasks: Any, capsys: Capture) -> None:
        two_tasks.edit(
            lambda m: m["precisions"]["int4"].update(
                fidelity={
                    "code": {
                        "texts": 500,
                        "dims": {
                            "4": {"cosine_mean": 0.5},
                            "8": {"cosine_mean": 0.98765, "cosine_min": 0.9},
                        },
                        "quality": {"code": {"8": {"value": 0.75, "reference": 0.76}}},
                    },
                    "retrieval": {"of": "another form"},
                }
            )
        )
        assert main(["inspect", str(two_tasks.path)]) == 0
        out = capsys.readouterr().out
        for fact in (
            "source        tiny (bert)",
            "license       not stated",
            "vectors       8 dimensions, cosine similarity, normalized",
            "truncation    to 2, 4, 8",
            "longest text  16 tokens",
            "retrieval  retrieval-lora  query*='query: '  passage='passage: '",
            "int4       cpu",
            "int4       code       500    0.98765  0.90000          0.7500 (0.7600)",
            "15 files",
        ):
            assert fact in out

    @pytest.mark.parametrize("width", [60, 80, 200])
    def test_it_fits_the_terminal(
        self,
        make_bundle: Any,
        capsys: Capture,
        monkeypatch: pytest.MonkeyPatch,
        width: int,
    ) -> None:
        """And loses nothing: the cells hold their words, in lines below each other."""
        prompt = "Instruct: Given a question, retrieve passages that answer it\nQuery: "
        tiny = make_bundle(
            tasks=[f"task-{i}" for i in range(12)], prompts={"query": prompt, "passage": prompt}
        )
        layers = tiny.path / "fp32" / "task-0.layers.json"
        name = "model.vision_tower.encoder.layers.0.self_attention.query_projection.weight"
        layers.write_text(json.dumps({"layers": [{"name": name, "shape": [2048, 8192]}]}))
        entry = {
            "size": layers.stat().st_size,
            "sha256": hashlib.sha256(layers.read_bytes()).hexdigest(),
        }
        tiny.edit(lambda m: m["files"].update({"fp32/task-0.layers.json": entry}))
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["inspect", str(tiny.path), "--layers"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width
        below = "".join(line[: width // 3].split("  ")[0] for line in lines)
        assert "model.vision_tower.encoder" in below.replace(" ", "")
        assert "task-11" in "".join(lines)

    def test_verify_finds_a_flipped_byte(self, bundle: Any, capsys: Capture) -> None:
        assert main(["inspect", str(bundle.path), "--verify"]) == 0
        assert "verified: 5 files match their SHA-256" in capsys.readouterr().out
        file = bundle.path / "fp32/shared.bin"
        data = bytearray(file.read_bytes())
        data[-1] ^= 128
        file.write_bytes(bytes(data))
        assert main(["inspect", str(bundle.path)]) == 0
        capsys.readouterr()
        assert main(["inspect", str(bundle.path), "--verify"]) == 1
        assert "shared.bin: expected SHA-256" in error_line(capsys)

    def test_layers_come_as_recorded_or_worst_first(self, two_tasks: Any, capsys: Capture) -> None:
        def order(*arguments: str) -> list[str]:
            call = ["--layers", "--task", "code", "--precision", "int4", *arguments]
            assert main(["inspect", str(two_tasks.path), *call]) == 0
            lines = capsys.readouterr().out.splitlines()
            return [line.split()[0] for line in lines if line.startswith(("small", "worst"))]

        assert order() == ["small", "worst"]
        assert order("--worst-first") == ["worst", "small"]

    def test_every_task_and_precision_has_its_table(self, two_tasks: Any, capsys: Capture) -> None:
        assert main(["inspect", str(two_tasks.path), "--layers"]) == 0
        out = capsys.readouterr().out
        for title in ("fp32, retrieval", "fp32, code", "int4, retrieval", "int4, code"):
            assert f"\n{title}\n" in out

    def test_json_is_one_document(self, bundle: Any, capsys: Capture) -> None:
        assert main(["inspect", str(bundle.path), "--json", "--layers"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["manifest"] == bundle.manifest()
        assert document["problems"] == []
        assert document["layers"][0]["layers"][1]["name"] == "worst"

    def test_what_is_not_there_is_refused(
        self, bundle: Any, tmp_path: Path, capsys: Capture
    ) -> None:
        assert main(["inspect", str(bundle.path), "--layers", "--task", "x"]) == 2
        assert "no task 'x'; it has retrieval" in error_line(capsys)
        assert main(["inspect", str(bundle.path), "--worst-first"]) == 2
        assert "go with --layers" in error_line(capsys)
        assert main(["inspect", str(tmp_path / "x")]) == 1
        assert "expected a bundle's folder" in error_line(capsys)


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

    def test_closed_standard_input(self, bundle: Any, tmp_path: Path) -> None:
        done = self.run("<&-", "embed", str(bundle.path))
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr == (
            b"embedge: error: standard input is closed; name a file with --input FILE\n"
        )
        (tmp_path / "in").write_text("w1\n")
        done = self.run("<&-", "embed", str(bundle.path), "--input", str(tmp_path / "in"))
        assert vectors_of(done.stdout.decode()).shape == (1, 8)

    @pytest.mark.parametrize("name", ["out.npy", "out.jsonl"])
    def test_closed_standard_output(self, bundle: Any, tmp_path: Path, name: str) -> None:
        done = self.run(">&-", "embed", str(bundle.path))
        assert done.returncode == 1
        assert done.stderr == (
            b"embedge: error: standard output is closed; name a file with --output FILE\n"
        )
        target = tmp_path / name
        for closed in (">&-", "2>&-", ">&- 2>&-"):
            done = self.run(closed, "embed", str(bundle.path), "--output", str(target))
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
            if name == "out.npy":
                assert np.load(target).shape == (1, 8)
            else:
                assert vectors_of(target.read_text()).shape == (1, 8)
            target.unlink()
        for command in ("inspect", "prepare"):
            assert self.run("<&- >&- 2>&-", command, str(bundle.path)).returncode == 0

    def test_closed_standard_error_takes_messages_that_output_does_not_get(
        self, bundle: Any
    ) -> None:
        done = self.run("2>&-", "embed", str(bundle.path), "--task", "nothing")
        assert (done.returncode, done.stdout) == (2, b"")


class TestProgress:
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


@pytest.mark.parametrize("command", ["export", "embed", "prepare", "inspect", "bench"])
def test_help_ends_with_examples_that_parse(
    command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_control_characters_of_a_bundle_reach_no_terminal(
    bundle: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bundle.path / "manifest.json"
    manifest = json.loads(file.read_text())
    evil = "\x1b]0;x\x07\x1b[2J\u202e"
    manifest["source"] |= {"name": evil, "license": evil}
    for task in manifest["tasks"].values():
        task["prompts"] = {evil: evil}
    file.write_text(json.dumps(manifest))
    assert main(["inspect", str(bundle.path)]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b]0;x\\x07" in shown
    assert all(line.isprintable() for line in shown.splitlines())
    manifest["model"]["similarity"] = evil
    file.write_text(json.dumps(manifest))
    assert main(["inspect", str(bundle.path)]) == 1
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())


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
