"""``--shard`` splits an input, and ``--resume`` goes on where a killed run was.

``python -m tests.fuzz.resume BUNDLE`` kills at more moments.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder, EmbedgeError
from embedge.runtime.bundle.lock import sole_holder
from embedge.runtime.cli import embed as embed_module
from embedge.runtime.cli import parts as parts_module
from embedge.runtime.cli.main import main
from embedge.runtime.cli.rows import SteadyFile, open_rows, shard_of
from tests.helpers.command import Capture, error_line

ROOT = Path(__file__).resolve().parents[3]
TEXTS = [f"w{i} w{i * 7 % 60}" for i in range(23)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_module, "_CHUNK_TEXTS", 4)
    monkeypatch.setattr(parts_module, "_PART_SECONDS", 0.0)


@pytest.fixture
def call(bundle: Any, tmp_path: Path) -> list[str]:
    (tmp_path / "in").write_text("\n".join(TEXTS))
    (tmp_path / "outputs").mkdir()
    source = ["--input", str(tmp_path / "in"), "--batch-size", "4"]
    return ["embed", str(bundle.path), *source, "--output", str(tmp_path / "outputs" / "out.npy")]


@pytest.fixture
def stopped(call: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Path:
    """What an interrupted run has left: three parts of four rows."""
    return stop(call, monkeypatch, capsys)


def stop(call: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Path:
    """Interrupts a run with three parts of four rows."""
    calls = [0]

    def stopping(encode: Any) -> Any:
        def encoded(self: Embedder, texts: Any, **options: Any) -> Any:
            calls[0] += bool(texts)
            if calls[0] == 4:  # the third chunk is written meanwhile
                raise KeyboardInterrupt
            return encode(self, texts, **options)

        return encoded

    with monkeypatch.context() as patch:
        for name in ("encode", "encode_query", "encode_document"):
            patch.setattr(Embedder, name, stopping(getattr(Embedder, name)))
        assert main([*call, "--resume"]) == 130
    capsys.readouterr()
    out = Path(call[call.index("--output") + 1])
    assert not out.exists()
    return out


def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are embedded from now on."""
    encode, texts = Embedder.encode, []

    def noting(self: Embedder, some: Any, **options: Any) -> Any:
        texts.extend(some)
        return encode(self, some, **options)

    monkeypatch.setattr(Embedder, "encode", noting)
    return texts


class TestShards:
    @pytest.mark.parametrize("rows", [0, 1, 2, 7, 1000])
    @pytest.mark.parametrize("count", [1, 2, 3, 7])
    def test_they_follow_each_other_without_a_gap(self, rows: int, count: int) -> None:
        ends = [shard_of(rows, (number, count)) for number in range(1, count + 1)]
        assert ends[0][0] == 0
        assert ends[-1][1] == rows
        assert all(one[1] == following[0] for one, following in pairwise(ends))
        sizes = [stop - start for start, stop in ends]
        assert max(sizes) - min(sizes) <= 1

    @pytest.mark.parametrize("name", ["in", "in.csv", "in.jsonl", "in.parquet"])
    @pytest.mark.parametrize("count", [3, pytest.param(30, marks=pytest.mark.slow)])
    def test_their_outputs_in_a_row_are_the_whole(
        self, bundle: Any, tmp_path: Path, name: str, count: int
    ) -> None:
        from tests.fuzz.resume import ROWS, write_inputs

        write_inputs(tmp_path)
        name = "lines" if name == "in" else name
        call = ["embed", str(bundle.path), "--input", str(tmp_path / name)]
        call += ["--format", "jsonl", *(["--field", "text"] if name == "in.jsonl" else [])]
        assert main([*call, "--output", str(tmp_path / "whole")]) == 0
        rows = []
        for number in range(1, count + 1):
            out = tmp_path / "part"
            assert main([*call, "--output", str(out), "--shard", f"{number}/{count}"]) == 0
            rows += [json.loads(line) for line in out.read_text().splitlines()]
        expected = [json.loads(line) for line in (tmp_path / "whole").read_text().splitlines()]
        assert len(rows) == ROWS
        assert [row.get("id") for row in rows] == [row.get("id") for row in expected]
        np.testing.assert_allclose(
            [row["embedding"] for row in rows],
            [row["embedding"] for row in expected],
            atol=1e-6,
            rtol=0,
        )

    @pytest.mark.parametrize("end", ["csv", "npy", "parquet"])
    def test_they_are_joined_as_the_guide_says(self, bundle: Any, tmp_path: Path, end: str) -> None:
        pq = pytest.importorskip("pyarrow.parquet")
        rows = "".join(f"{i},{text}\n" for i, text in enumerate(TEXTS))
        (tmp_path / "in.csv").write_text(f"id,text\n{rows}")
        (tmp_path / "shards").mkdir()
        call = ["embed", str(bundle.path), "--input", str(tmp_path / "in.csv")]
        one, two = (tmp_path / "shards" / f"{number}.{end}" for number in (1, 2))
        assert main([*call, "--output", str(one), "--shard", "1/2"]) == 0
        assert main([*call, "--output", str(two), "--shard", "2/2"]) == 0
        if end == "csv":
            joined = one.read_text() + two.read_text().partition("\n")[2]
            found = list(csv.DictReader(joined.splitlines()))
            ids = [int(row["id"]) for row in found]
            vectors = np.array([json.loads(row["embedding"]) for row in found])
        elif end == "npy":
            ids = list(range(len(TEXTS)))
            vectors = np.concatenate([np.load(one), np.load(two)])
        else:
            table = pq.read_table(tmp_path / "shards").to_pydict()
            ids, vectors = [int(i) for i in table["id"]], np.array(table["embedding"])
        assert ids == list(range(len(TEXTS)))
        expected = Embedder(bundle.path).encode(TEXTS)
        np.testing.assert_allclose(vectors, expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("option", ["--shard 1/2", "--resume"])
    def test_a_pipe_is_refused_at_once(
        self, call: list[str], tmp_path: Path, capsys: Capture, option: str
    ) -> None:
        os.mkfifo(tmp_path / "pipe")
        more = ["--input", str(tmp_path / "pipe"), *option.split()]
        assert main([*call, *more]) == 2
        line = error_line(capsys)
        assert (
            f"{option.partition(' ')[0]}: the input is read twice, which only a regular file can be"
            in line
        )
        assert not Path(call[-1]).exists()

    @pytest.mark.parametrize("moment", ["counted", "read"])
    @pytest.mark.parametrize("option", ["--shard 1/2", "--resume"])
    @pytest.mark.parametrize("change", ["appended", "replaced"])
    def test_an_input_that_changes_is_noticed(
        self,
        call: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: Capture,
        moment: str,
        option: str,
        change: str,
    ) -> None:
        source = tmp_path / "in"
        opened = [0]
        of_module = open_rows

        def changing(*arguments: Any) -> Any:
            opened[0] += 1
            if opened[0] == (1 if moment == "counted" else 2):
                if change == "appended":
                    with source.open("a") as file:
                        file.write("\nw1")
                else:  # of the same size and times
                    other, status = tmp_path / "other", source.stat()
                    other.write_text(source.read_text()[::-1])
                    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
                    other.replace(source)
            return of_module(*arguments)

        monkeypatch.setattr(embed_module, "open_rows", changing)
        assert main([*call, *option.split()]) == 1
        assert "expected the file of the start" in error_line(capsys)
        assert not Path(call[-1]).exists()

    def test_rows_that_do_not_come_are_noticed_where_times_say_nothing(
        self,
        call: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: Capture,
    ) -> None:
        monkeypatch.setattr(SteadyFile, "check", lambda self: None)

        def cut(rows: int, shard: tuple[int, int]) -> tuple[int, int]:
            (tmp_path / "in").write_text("\n".join(TEXTS[:-5]))
            return shard_of(rows, shard)

        monkeypatch.setattr(embed_module, "shard_of", cut)
        assert main([*call, "--shard", "2/2"]) == 1
        assert "--shard 2/2: expected 12 rows of " in error_line(capsys)
        assert not Path(call[-1]).exists()

    def test_parquet_says_which_rows_of_which_input_it_has(
        self, call: list[str], tmp_path: Path
    ) -> None:
        pq = pytest.importorskip("pyarrow.parquet")
        out = tmp_path / "2.parquet"
        assert main([*call[:-1], str(out), "--shard", "2/3"]) == 0
        said = json.loads(pq.read_metadata(out).metadata[b"embedge.shard"])
        digest = hashlib.sha256((tmp_path / "in").read_bytes()).hexdigest()
        assert said == {"input_sha256": digest, "rows": [7, 15], "of": 23}
        assert pq.read_metadata(out).num_rows == 8

    @pytest.mark.parametrize("resume", [[], ["--resume"]])
    @pytest.mark.parametrize("end", ["csv", "parquet"])
    def test_shards_of_jsonl_have_the_columns_of_its_first_rows(
        self, bundle: Any, tmp_path: Path, resume: list[str], end: str
    ) -> None:
        pq = pytest.importorskip("pyarrow.parquet")
        rows = [{"a": i + 0.5 if i < 4 else i, "b": i, "text": "w1"} for i in range(8)]
        rows[4:] = [dict(reversed(row.items())) for row in rows[4:]]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        call = ["embed", str(bundle.path), "--input", str(tmp_path / "in.jsonl"), *resume]
        heads: list[Any] = []
        for shard in ("1/3", "3/3"):
            out = tmp_path / f"{shard[0]}.{end}"
            more = ["--batch-size", "4", "--output", str(out), "--shard", shard]
            assert main([*call, *more]) == 0
            schema = pq.read_schema(out) if end == "parquet" else out.read_text().split("\n")[0]
            heads.append(schema)
        assert heads[0] == heads[1]


class TestResume:
    def test_a_run_goes_on_after_the_rows_that_are_there(
        self, stopped: Path, call: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        parts = sorted(path.name for path in stopped.with_name("out.npy.parts").iterdir())
        assert parts == [f"{i:012d}-{i + 4:012d}.npy" for i in (0, 4, 8)] + ["job.json"]
        texts = embedded(monkeypatch)
        assert main([*call, "--resume"]) == 0
        assert capsys.readouterr().err == "embedge: goes on after 12 of 23 rows\n"
        assert texts == TEXTS[12:]
        np.testing.assert_allclose(
            np.load(stopped), Embedder(call[1]).encode(TEXTS), atol=1e-6, rtol=0
        )
        assert os.listdir(stopped.parent) == ["out.npy"]

    def test_a_run_that_nothing_stops_leaves_the_output_alone(self, call: list[str]) -> None:
        assert main([*call, "--resume"]) == 0
        out = Path(call[-1])
        assert os.listdir(out.parent) == ["out.npy"]
        assert np.load(out).shape == (23, 8)

    @pytest.mark.parametrize("file_format", ["npy", "csv", "jsonl", "parquet"])
    def test_no_rows(self, call: list[str], tmp_path: Path, file_format: str) -> None:
        if file_format == "parquet":
            pytest.importorskip("pyarrow")
        (tmp_path / "in").write_text("")
        out = tmp_path / "outputs" / "some"
        assert main([*call[:-1], str(out), "--resume", "--format", file_format]) == 0
        assert main([*call[:-1], str(out) + "2", "--format", file_format]) == 0
        assert out.read_bytes() == (tmp_path / "outputs" / "some2").read_bytes()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("input", 'input: "'),
            ("--truncate-dim 4", "dim: 8 stored, 4 here"),
            ("--output-format float16", 'dtype: "float32" then, "float16" now'),
            ("--format jsonl", 'format: "npy" then, "jsonl" now'),
            ("--shard 1/2", 'shard: null then, "1/2" now'),
            ("--input-format csv", 'input_format: "lines" then, "csv" now'),
        ],
    )
    def test_rows_of_another_call_are_refused_and_left(
        self,
        stopped: Path,
        call: list[str],
        tmp_path: Path,
        capsys: Capture,
        change: str,
        message: str,
    ) -> None:
        parts = stopped.with_name("out.npy.parts")
        before = sorted(path.name for path in parts.iterdir())
        more = change.split()
        if change == "input":
            more = []
            (tmp_path / "in").write_text("\n".join([*TEXTS[:-1], "w9"]))
        elif change.endswith("csv"):
            (tmp_path / "in").write_text("text\nw1\n")
        assert main([*call, "--resume", *more]) == 1
        line = error_line(capsys)
        assert f"--resume: {parts} holds " in line
        assert message in line
        assert sorted(path.name for path in parts.iterdir()) == before

    @pytest.mark.parametrize(
        ("first", "more", "message"),
        [
            ("", "--keep a", 'keep: null then, ["a"] now'),
            ("--keep a", "--keep a b", 'keep: ["a"] then, ["a", "b"] now'),
            ("", "--column b", 'column: "text" then, "b" now'),
            ("", "--prompt-name q", "prompt: "),
            ("--role query", "--role document", "prompt: "),
            ("", "--normalize", "normalized: "),
            ("", "--max-seq-length 3", "max_length: "),
            ("--output-format int8", "--ranges", "ranges: "),
        ],
    )
    def test_rows_of_other_options_are_refused(
        self,
        make_bundle: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: Capture,
        first: str,
        more: str,
        message: str,
    ) -> None:
        pytest.importorskip("pyarrow")
        prompts = {"q": "w5", "query": "w6", "document": "w7"}
        bundle = make_bundle("prompted", prompts=prompts, model={"normalize": False})
        lines = "".join(f"{i},{i * 2},{text}\n" for i, text in enumerate(TEXTS))
        (tmp_path / "in.csv").write_text(f"a,b,text\n{lines}")
        np.save(tmp_path / "wide.npy", np.array([[-9.0] * 8, [9.0] * 8], np.float32))
        np.save(tmp_path / "wider.npy", np.array([[-10.0] * 8, [9.0] * 8], np.float32))
        call = ["embed", str(bundle.path), "--input", str(tmp_path / "in.csv"), *first.split()]
        call += ["--batch-size", "4", "--output", str(tmp_path / "out.parquet")]
        others = more.split()
        if more == "--ranges":
            call += ["--ranges", str(tmp_path / "wide.npy")]
            others += [str(tmp_path / "wider.npy")]
        out = stop(call, monkeypatch, capsys)
        parts = out.with_name("out.parquet.parts")
        before = sorted(path.name for path in parts.iterdir())
        assert main([*call, *others, "--resume"]) == 1
        line = error_line(capsys)
        assert f"--resume: {parts} holds " in line
        assert message in line
        assert sorted(path.name for path in parts.iterdir()) == before
        assert main([*call, "--resume"]) == 0

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("precious.npy", "mine", "found precious.npy in it"),
            ("000000000000-000000000004.npy", "mine", "job.json: No such file"),
            ("job.json", '{"mine": 1}', 'expected a job of embedge\'s with "version": 1'),
            ("job.json", "mine", "job.json: "),
            ("next.npy/mine", "mine", "found next.npy in it"),
        ],
    )
    def test_a_folder_that_is_not_its_own_is_left_as_it_is(
        self, call: list[str], capsys: Capture, name: str, content: str, message: str
    ) -> None:
        file = Path(call[-1]).with_name("out.npy.parts") / name
        file.parent.mkdir(parents=True)
        file.write_text(content)
        for _ in range(2):
            assert main([*call, "--resume"]) == 1
            assert message in error_line(capsys)
        assert file.read_text() == content
        assert os.listdir(Path(call[-1]).parent) == ["out.npy.parts"]

    def test_a_link_is_not_followed(self, call: list[str], tmp_path: Path, capsys: Capture) -> None:
        (tmp_path / "mine").mkdir()
        Path(call[-1]).with_name("out.npy.parts").symlink_to(tmp_path / "mine")
        assert main([*call, "--resume"]) == 1
        assert "found a link" in error_line(capsys)
        assert os.listdir(tmp_path / "mine") == []

    def test_a_file_that_comes_among_the_parts_is_left(
        self, stopped: Path, call: list[str], capsys: Capture
    ) -> None:
        mine = stopped.with_name("out.npy.parts") / "mine"
        mine.write_text("mine")
        assert main([*call, "--resume"]) == 1
        assert "found mine in it; nothing was deleted" in error_line(capsys)
        mine.unlink()
        assert main([*call, "--resume"]) == 0
        assert os.listdir(stopped.parent) == ["out.npy"]

    def test_another_bundle_is_refused(
        self, stopped: Path, call: list[str], make_bundle: Any, capsys: Capture
    ) -> None:
        other = make_bundle("other", special_tokens=False)
        assert main(["embed", str(other.path), *call[2:], "--resume"]) == 1
        line = error_line(capsys)
        assert "holds other vectors: expected vectors of the fingerprint e1:" in line
        assert "tokenizer: " in line

    def test_a_lost_part_is_named(self, stopped: Path, call: list[str], capsys: Capture) -> None:
        parts = stopped.with_name("out.npy.parts")
        (parts / "000000000004-000000000008.npy").unlink()
        assert main([*call, "--resume"]) == 1
        assert "expected a part with row 4, found 000000000008-000000000012.npy next" in error_line(
            capsys
        )

    @pytest.mark.parametrize("content", [None, "{", "[]"])
    def test_a_damaged_job_is_named(
        self, stopped: Path, call: list[str], capsys: Capture, content: str | None
    ) -> None:
        job = stopped.with_name("out.npy.parts") / "job.json"
        job.unlink()
        if content is not None:
            job.write_text(content)
        assert main([*call, "--resume"]) == 1
        assert "to start anew" in error_line(capsys)

    @pytest.mark.parametrize("folder", [False, True])
    def test_an_output_that_is_there_is_not_made_again(
        self, call: list[str], capsys: Capture, folder: bool
    ) -> None:
        Path(call[-1]).write_text("old")
        if folder:
            Path(call[-1]).with_name("out.npy.parts").mkdir()
        assert main([*call, "--resume"]) == 1
        assert "is there already, and no out.npy.parts to continue" in error_line(capsys)
        assert Path(call[-1]).read_text() == "old"

    def test_one_process_at_a_time(self, stopped: Path, call: list[str], capsys: Capture) -> None:
        lock = stopped.with_name(".out.npy.parts.lock")
        with sole_holder(lock, EmbedgeError):
            assert main([*call, "--resume"]) == 1
        assert "is being written by " in error_line(capsys)

    def test_an_input_that_changes_meanwhile_is_noticed(
        self, call: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        encode = Embedder.encode

        def changing(self: Embedder, texts: Any, **options: Any) -> Any:
            if texts:
                (tmp_path / "in").write_text("\n".join([*TEXTS, "w1"]))
            return encode(self, texts, **options)

        monkeypatch.setattr(Embedder, "encode", changing)
        assert main([*call, "--resume"]) == 1
        assert "found that it was written to meanwhile" in error_line(capsys)
        assert not Path(call[-1]).exists()

    def test_columns_of_jsonl_are_those_of_the_first_part(
        self, bundle: Any, tmp_path: Path, capsys: Capture
    ) -> None:
        pytest.importorskip("pyarrow")
        rows = [f'{{"id": {i if i < 8 else 0.5}, "text": "w1"}}\n' for i in range(12)]
        (tmp_path / "in").write_text("".join(rows))
        call = ["embed", str(bundle.path), "--field", "text", "--input", str(tmp_path / "in")]
        call += ["--batch-size", "4", "--output", str(tmp_path / "out.parquet"), "--resume"]
        assert main(call) == 1
        assert (
            "output row 9: column 'id': expected int64 as in the first rows, found 0.5; a Parquet "
            "column has one type"
        ) in error_line(capsys)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_killed_runs_lose_and_double_no_row(bundle: Any) -> None:
    pytest.importorskip("pyarrow")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.resume", str(bundle.path), "--count", "4"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "4 jobs, 0 faults"
    assert "0 kills" not in done.stdout.replace("10 kills", "").replace("20 kills", "")
