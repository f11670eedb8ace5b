"""``embedge.integrations.ray`` on a local Ray with two cores: ``make test-ray``."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder, EmbedgeError, EmbedgeValueError, FingerprintError
from tests.runtime.conftest import WORDS, TinyBundle, bundles_in

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

# Ray sets options of its own that it calls deprecated, leaves sockets to the end, and warns of little data.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in (
        "DeprecationWarning",
        "FutureWarning",
        "ResourceWarning",
        "UserWarning",
        "pytest.PytestUnraisableExceptionWarning",
    )
]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="ray is not installed; `make test-ray` brings it",
)
ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"w{i % 60} w{i * 7 % 60}" for i in range(200)]
CHOICE: Any = {"task": "code", "precision": "fp32"}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return bundles_in(tmp_path_factory.mktemp("bundles"))(
        "bundle",
        tasks=("retrieval", "code"),
        precisions={"fp32": {}, "int4": {}},
        prompts={"query": "query:", "passage": "passage:"},
        default_prompt=None,
        model={"matryoshka_dims": [2, 4, 8]},
    )


@pytest.fixture(scope="module")
def two_cores() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def expected(bundle: TinyBundle, texts: list[str]) -> np.ndarray[Any, Any]:
    """What the bundle's weights give, without embedge."""
    return np.stack(
        [
            bundle.expected("code", [WORDS.index(w) for w in f"[CLS] {text} [SEP]".split()])
            for text in texts
        ]
    )


def write(folder: Path, files: int, rows: int = 20) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(files):
        ids = range(number * rows, (number + 1) * rows)
        table = pa.table({"id": ids, "text": [TEXTS[i % len(TEXTS)] for i in ids]})
        paths.append(folder / f"{number:03d}.parquet")
        pq.write_table(table, paths[-1], row_group_size=7)
    return paths


def change_a_letter(path: Path) -> None:
    """Changes one text of an uncompressed file, whose size and footer stay the same."""
    data = path.read_bytes()
    assert data.count(b"w7 w49") == 1
    path.write_bytes(data.replace(b"w7 w49", b"w8 w49"))


def rows_of(folder: Path) -> Any:
    """All rows of a folder's files, in the order of the files."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.rglob("*.parquet"))])


def vectors_of(table: Any, name: str = "embedding") -> np.ndarray[Any, Any]:
    return np.array(table.column(name).to_pylist(), np.float32)


@pytest.mark.slow
@needs_ray
@pytest.mark.usefixtures("two_cores")
class TestDataset:
    def test_columns_of_texts_get_columns_of_vectors(self, bundle: TinyBundle) -> None:
        import ray

        from embedge.integrations.ray import embed_dataset

        ds = ray.data.from_arrow(pa.table({"id": range(200), "title": TEXTS, "body": TEXTS[::-1]}))
        ds = embed_dataset(
            ds.repartition(8),
            bundle.path,
            columns={"title": "t", "body": "b"},
            actors=2,
            threads_per_actor=1,
            batch_size=16,
            **CHOICE,
        )
        table = pa.concat_tables([ray.get(ref) for ref in ds.to_arrow_refs()]).sort_by("id")
        assert table.column_names == ["id", "title", "body", "t", "b"]
        assert table.schema.field("t").type == pa.list_(pa.float32(), 8)
        np.testing.assert_allclose(vectors_of(table, "t"), expected(bundle, TEXTS), atol=1e-6)
        np.testing.assert_allclose(vectors_of(table, "b"), expected(bundle, TEXTS[::-1]), atol=1e-6)

    def test_parquet_goes_in_and_out(self, bundle: TinyBundle, tmp_path: Path) -> None:
        import ray

        from embedge.integrations.ray import embed_dataset

        write(tmp_path / "in", 5)
        ds = ray.data.read_parquet(str(tmp_path / "in"), override_num_blocks=4)
        ds = embed_dataset(
            ds, bundle.path, actors=2, output_format="float16", truncate_dim=4, **CHOICE
        )
        ds.write_parquet(str(tmp_path / "out"))
        table = rows_of(tmp_path / "out").sort_by("id")
        assert table.column("id").to_pylist() == list(range(100))
        model = Embedder(bundle.path, **CHOICE)
        vectors = model.encode(TEXTS[:100], truncate_dim=4)
        np.testing.assert_allclose(vectors_of(table), vectors, atol=1e-3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"task": "x"}, "no task 'x'; it has retrieval, code"),
            ({"task": None}, "tasks: retrieval, code; choose one"),
            ({"precision": "int2"}, "no precision 'int2'"),
            ({"prompt_name": "x"}, "no prompt 'x'"),
            ({"truncate_dim": 3}, "truncate_dim is 3"),
            ({"role": "both"}, "role is 'both'; expected 'query', 'document' or None"),
            ({"columns": "body"}, "ds: expected one column 'body', found no such column"),
            ({"columns": "id"}, "ds: column 'id': expected strings, found int64"),
            ({"columns": {"text": "v", "title": "v"}}, "all different"),
            ({"output_format": "int7"}, "output_format is 'int7'"),
            ({"actors": 0}, "actors is 0; expected a whole number"),
            ({"threads_per_actor": 0}, "threads_per_actor is 0"),
            ({"batch_size": 0}, "batch_size is 0"),
        ],
    )
    def test_a_wrong_call_is_an_error_before_an_actor_starts(
        self, bundle: TinyBundle, options: Any, message: str
    ) -> None:
        import ray

        from embedge.integrations.ray import embed_dataset

        ds = ray.data.from_arrow(pa.table({"id": [1], "text": ["w1"]}))
        with pytest.raises(EmbedgeValueError, match=None) as caught:
            embed_dataset(ds, bundle.path, **{**CHOICE, **options})
        assert message in str(caught.value)

    def test_an_unknown_option_is_no_option(self, bundle: TinyBundle) -> None:
        import ray

        from embedge.integrations.ray import embed_dataset

        ds = ray.data.from_arrow(pa.table({"text": ["w1"]}))
        with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
            embed_dataset(ds, bundle.path, **{**CHOICE, "batchsize": 3})


@pytest.mark.slow
@needs_ray
@pytest.mark.usefixtures("two_cores")
class TestParquet:
    def test_each_file_becomes_one_and_a_second_call_keeps_them(
        self, bundle: TinyBundle, tmp_path: Path
    ) -> None:
        from embedge.integrations.ray import embed_parquet

        write(tmp_path / "in", 3)
        write(tmp_path / "in" / "deeper", 2)
        call: Any = {"actors": 2, "threads_per_actor": 1, **CHOICE}
        done = embed_parquet(tmp_path / "in", tmp_path / "out", bundle.path, **call)
        assert (done.files, done.kept, done.rows) == (5, 0, 100)
        assert done.fingerprint == Embedder(bundle.path, **CHOICE).fingerprint()
        for path in (tmp_path / "in").rglob("*.parquet"):
            out = tmp_path / "out" / path.relative_to(tmp_path / "in")
            table, before = pq.read_table(out), pq.read_table(path)
            assert table.column_names == ["id", "embedding"]
            assert table.column("id").equals(before.column("id"))
            texts = before.column("text").to_pylist()
            np.testing.assert_allclose(vectors_of(table), expected(bundle, texts), atol=1e-6)
            metadata = pq.read_metadata(out).metadata
            assert metadata[b"embedge.fingerprint"].decode() == done.fingerprint
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
        first = tmp_path / "out" / "000.parquet"
        first.unlink()
        again = embed_parquet(tmp_path / "in", tmp_path / "out", bundle.path, **call)
        assert (again.files, again.kept, again.rows) == (1, 4, 20)
        after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
        assert {path for path in times if times[path] != after[path]} == {first}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"truncate_dim": 4}, "dim: 8 stored, 4 here"),
            ({"output_format": "float16"}, 'format: null stored, "float16" here'),
            ({"keep": []}, "keep: None then, [] now"),
            ("input", "sha256: "),
            ("foreign", "expected a file of embed_parquet, found another"),
            ("damaged", "expected a whole Parquet file"),
        ],
    )
    def test_files_of_another_call_are_refused(
        self, bundle: TinyBundle, tmp_path: Path, options: Any, message: str
    ) -> None:
        from embedge.integrations.ray import embed_parquet

        [path] = write(tmp_path / "in", 1)
        pq.write_table(
            pq.read_table(path),
            path,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )
        call: Any = {"actors": 1, "threads_per_actor": 1, **CHOICE}
        embed_parquet(path, tmp_path / "out", bundle.path, **call)
        out = tmp_path / "out" / path.name
        if options == "input":
            change_a_letter(path)
        elif options == "foreign":
            pq.write_table(pa.table({"a": [1]}), out)
        elif options == "damaged":
            out.write_bytes(out.read_bytes()[:-9])
        if isinstance(options, str):
            options = {}
        with pytest.raises(EmbedgeError) as caught:
            embed_parquet(path, tmp_path / "out", bundle.path, **{**call, **options})
        assert str(out) in str(caught.value)
        assert message in str(caught.value)

    def test_a_row_without_a_text_is_named_and_the_file_is_not_written(
        self, bundle: TinyBundle, tmp_path: Path
    ) -> None:
        from embedge.integrations.ray import embed_parquet

        write(tmp_path / "in", 1)
        null = tmp_path / "in" / "null.parquet"
        pq.write_table(pa.table({"text": ["w1", None]}), null, write_statistics=False)
        with pytest.raises(
            EmbedgeError, match=r"null\.parquet: row 2: expected a text, found null"
        ):
            embed_parquet(tmp_path / "in", tmp_path / "out", bundle.path, **CHOICE)
        left = {path.name for path in (tmp_path / "out").iterdir()}
        assert left <= {"000.parquet"}

    def test_wrong_inputs_are_named(self, bundle: TinyBundle, tmp_path: Path) -> None:
        from embedge.integrations.ray import embed_parquet

        def message(inputs: Any, output: Path = tmp_path / "out", **options: Any) -> str:
            with pytest.raises(EmbedgeError) as caught:
                embed_parquet(inputs, output, bundle.path, **{**CHOICE, **options})
            return str(caught.value)

        one, other = write(tmp_path / "a", 1)[0], write(tmp_path / "b", 1)[0]
        (tmp_path / "empty").mkdir()
        assert "would both become" in message([one, other])
        assert "found none whose name ends in .parquet" in message(tmp_path / "empty")
        assert "found none whose name ends in .parquet" in message([])
        for output in (tmp_path / "a", tmp_path / "a" / "out"):
            assert "is the inputs' folder, or inside it" in message(tmp_path / "a", output)
        assert "is the input " in message(one, one.parent)
        assert "is the input " in message([one], one.parent)
        assert "expected a file or a folder of this machine" in message("s3://bucket/x.parquet")
        assert "found no such column" in message(one, column="body")
        assert not (tmp_path / "out").exists()


class TestWithoutRay:
    def test_an_actor_whose_vectors_are_others_is_refused(self, bundle: TinyBundle) -> None:
        import dataclasses

        from embedge.integrations.ray import _plan

        options: Any = {**CHOICE, "truncate_dim": 4}
        plan = _plan(bundle.path, options)
        vectors = plan.open()(["w1"])
        np.testing.assert_allclose(
            vectors, Embedder(bundle.path, **CHOICE).encode(["w1"], truncate_dim=4), atol=1e-6
        )
        other = dataclasses.replace(
            plan, kind={"parts": {**plan.kind["parts"], "numerics": "another"}}
        )
        with pytest.raises(FingerprintError, match="numerics"):
            other.open()

    @pytest.mark.parametrize("moment", ["before", "meanwhile"])
    def test_an_input_that_changes_is_noticed_by_the_actor(
        self,
        bundle: TinyBundle,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        moment: str,
    ) -> None:
        from embedge.integrations.ray import _Files, _identity, _plan

        [path] = write(tmp_path / "in", 1)
        pq.write_table(
            pq.read_table(path),
            path,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )
        made_of = {"column": "text", "keep": None, **_identity(str(path))}
        target = tmp_path / "out.parquet"
        item = {"source": str(path), "target": str(target), "made_of": made_of}
        files = _Files(_plan(bundle.path, CHOICE), [item])
        encode = files._encode

        def changing(texts: Any) -> Any:
            change_a_letter(path)
            return encode(texts)

        if moment == "before":
            change_a_letter(path)
        else:
            monkeypatch.setattr(files, "_encode", changing)
        with pytest.raises(
            EmbedgeError, match=r"000\.parquet: expected the file of the job's start"
        ):
            files({"id": [0]})
        assert [file.name for file in tmp_path.iterdir()] == ["in"]

    def test_versions_tested_are_those_of_the_guide(self) -> None:
        lines = (ROOT / "tests/integrations/ray-requirements.txt").read_text("utf-8").splitlines()
        pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
        table = (ROOT / "docs/guides/many-machines.md").read_text("utf-8")
        shown = dict(re.findall(r"^\|[^|]*\| `([\w-]+)` \| ([\d.]+) \|", table, flags=re.M))
        assert shown == {name.partition("[")[0]: version for name, version in pinned.items()}

    @pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="it is there")
    def test_it_says_how_to_get_it(self, bundle: TinyBundle, tmp_path: Path) -> None:
        from embedge.integrations.ray import embed_parquet

        write(tmp_path / "in", 1)
        with pytest.raises(ImportError, match=r'needs Ray Data, .* run `pip install "ray\[data\]'):
            embed_parquet(tmp_path / "in", tmp_path / "out", bundle.path, **CHOICE)


# A job of its own, with a Ray of its own, so that it can be killed as a whole.
JOB = """
import sys
import ray
from embedge.integrations.ray import embed_parquet

source, target, bundle = sys.argv[1:]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
done = embed_parquet(
    source, target, bundle, task="code", precision="fp32", actors=2, threads_per_actor=1
)
print(done.files, done.kept, done.rows)
"""
FILES, ROWS = 40, 3000


@pytest.mark.slow
@needs_ray
class TestKills:
    def start(self, tmp_path: Path, bundle: TinyBundle) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                JOB,
                str(tmp_path / "in"),
                str(tmp_path / "out"),
                str(bundle.path),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,
        )

    def check(self, tmp_path: Path, bundle: TinyBundle) -> None:
        table = rows_of(tmp_path / "out")
        assert table.column("id").to_pylist() == list(range(FILES * ROWS))
        by_text = expected(bundle, TEXTS)
        texts = np.arange(FILES * ROWS) % len(TEXTS)
        flat = table.column("embedding").combine_chunks().flatten().to_numpy()
        np.testing.assert_allclose(flat.reshape(-1, 8), by_text[texts], atol=1e-6)
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == [f"{number:03d}.parquet" for number in range(FILES)]

    def test_workers_that_are_killed_lose_and_double_no_row(
        self, bundle: TinyBundle, tmp_path: Path
    ) -> None:
        psutil = pytest.importorskip("psutil")
        write(tmp_path / "in", FILES, ROWS)
        job = self.start(tmp_path, bundle)
        killed: list[int] = []
        try:
            while job.poll() is None and len(killed) < 2:
                done = len(list((tmp_path / "out").glob("*.parquet")))
                if done >= 8 * (len(killed) + 1):
                    killed += kill_a_worker(psutil.Process(job.pid), killed)
                time.sleep(0.02)
            out, err = job.communicate(timeout=600)
        finally:
            end(job)
        assert len(set(killed)) == 2, err
        assert job.returncode == 0, err
        assert f"{FILES} 0 {FILES * ROWS}" in out.splitlines()  # Ray says there, too, who died
        self.check(tmp_path, bundle)

    def test_a_job_that_is_killed_goes_on(self, bundle: TinyBundle, tmp_path: Path) -> None:
        write(tmp_path / "in", FILES, ROWS)
        job = self.start(tmp_path, bundle)
        try:
            while job.poll() is None and len(list((tmp_path / "out").glob("*.parquet"))) < 10:
                time.sleep(0.02)
            assert job.poll() is None
        finally:
            end(job)
        kept = len(list((tmp_path / "out").glob("*.parquet")))
        assert 10 <= kept < FILES
        job = self.start(tmp_path, bundle)
        try:
            out, err = job.communicate(timeout=600)
        finally:
            end(job)
        assert f"{FILES - kept} {kept} {(FILES - kept) * ROWS}" in out.splitlines(), err
        self.check(tmp_path, bundle)


def kill_a_worker(job: Any, killed: list[int]) -> list[int]:
    """Kills an actor of a job, none that was killed before; its process id, if there is one."""
    for process in job.children(recursive=True):
        title = " ".join(process.cmdline())
        if process.pid not in killed and "_Files" in title:
            process.kill()
            return [process.pid]
    return []


def end(job: subprocess.Popen[str]) -> None:
    """Kills a job's process and, of its own session and descent, those that Ray started."""
    import psutil

    try:
        family = psutil.Process(job.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if job.poll() is None:
        job.send_signal(signal.SIGKILL)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()
    for stream in (job.stdout, job.stderr):
        if stream is not None:
            stream.close()
