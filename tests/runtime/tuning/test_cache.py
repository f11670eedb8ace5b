"""What `embedge prepare` measured: stored, read where it fits, and never a part of a vector."""

from __future__ import annotations

import gc
import json
import os
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder, EmbedgeWarning
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.cli import prepare as prepare_module
from embedge.runtime.cli.main import main
from embedge.runtime.encode import batch_size
from embedge.runtime.encode.batch_size import AMX_SINGLE_THREAD_TOKENS, CPU_BATCH_TOKENS_PER_THREAD
from embedge.runtime.host.processor import has_amx
from embedge.runtime.sessions.prepared_graphs import machine_name
from embedge.runtime.sessions.session import GraphSession
from embedge.runtime.sessions.session_workers import RunSettings, SessionWorkers
from embedge.runtime.tuning import autotune as timing
from embedge.runtime.tuning import turns
from embedge.runtime.tuning.cache import (
    TunedPrecision,
    add_tuning,
    read_tuning,
    tuning_file,
)

INTEGER = {"activation_constants": {"a": {"dtype": "uint8", "full": 128, "reduced": 64}}}
SHORT = AMX_SINGLE_THREAD_TOKENS if has_amx() else 0
SINGLE = RunSettings(single_thread=True, single_thread_tokens=SHORT, batch_tokens=512)
ALL = RunSettings(single_thread=False, single_thread_tokens=SHORT, batch_tokens=1024)
TEXTS = [f"w{i % 60} w{i // 60} w{(7 * i) % 60} " + "w1 " * (i % 11) for i in range(256)]


@pytest.fixture
def integer(make_bundle: Any) -> Any:
    """A small graph that lists itself as one with 8-bit products."""
    return make_bundle("integer", precisions={"int8": INTEGER}, model={"max_length": 100})


def found(bundle: Bundle, settings: RunSettings, precision: str = "int8") -> TunedPrecision:
    graph = bundle.manifest.precisions[precision].graphs["retrieval"]
    return TunedPrecision(
        task="retrieval",
        graph_sha256=bundle.manifest.files[graph].sha256,
        graph_bytes=1000,
        milliseconds={"1x16": 1.5, "32x64": 70.0},
        settings=settings,
    )


def measure(
    path: Path, settings: RunSettings, *, threads: int = 2, precision: str = "int8"
) -> Path:
    bundle = Bundle(path)
    return add_tuning(bundle, threads, {precision: found(bundle, settings, precision)})


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, int], int]]:
    """``((batch, tokens), threads)`` of every run."""
    seen: list[tuple[tuple[int, int], int]] = []
    run = GraphSession.run

    def recording(self: GraphSession, output: str, inputs: Any) -> Any:
        seen.append((inputs["input_ids"].shape, self.threads))
        return run(self, output, inputs)

    monkeypatch.setattr(GraphSession, "run", recording)
    return seen


class TestFile:
    def test_it_gives_back_what_was_stored(self, integer: Any) -> None:
        bundle = Bundle(integer.path)
        file = measure(integer.path, SINGLE)
        assert file == integer.path / "prepared" / machine_name() / "tuning.json"
        assert read_tuning(bundle, 2) == {"int8": found(bundle, SINGLE)}
        assert [path.name for path in file.parent.iterdir()] == ["tuning.json"]

    def test_nothing_was_measured_and_nothing_is_said(self, integer: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_tuning(Bundle(integer.path), 2) == {}

    def test_new_measurements_join_the_old_ones(self, two_tasks: Any) -> None:
        for threads, precision, settings in (
            (2, "int4", ALL),
            (2, "fp32", ALL),
            (3, "fp32", ALL),
            (2, "int4", SINGLE),
        ):
            measure(two_tasks.path, settings, threads=threads, precision=precision)
        bundle = Bundle(two_tasks.path)
        assert {p: m.settings for p, m in read_tuning(bundle, 2).items()} == {
            "int4": SINGLE,
            "fp32": ALL,
        }
        assert list(read_tuning(bundle, 3)) == ["fp32"]
        assert read_tuning(bundle, 1) == {}

    @pytest.mark.parametrize(
        ("spoil", "reason"),
        [
            (lambda file: file.write_text("{"), "not valid JSON"),
            (lambda file: file.write_text("[]"), "expected a JSON object"),
            (lambda file: edit(file, lambda d: d.pop("threads")), "threads: missing"),
            (lambda file: edit(file, lambda d: d.update(format_version=2)), "expected 1, found 2"),
            (lambda file: edit(file, lambda d: d.update(machine="m")), "measured on another, m"),
            (
                lambda file: edit(file, lambda d: d["threads"].update(two={})),
                "is no number of threads",
            ),
            (
                lambda file: edit(
                    file, lambda d: d["threads"]["2"]["int8"]["milliseconds"].update({"1x16": 0})
                ),
                "expected a time above 0",
            ),
            (
                lambda file: edit(
                    file, lambda d: d["threads"]["2"]["int8"]["settings"].update(batch_tokens=0)
                ),
                "expected a whole number ≥ 1",
            ),
        ],
    )
    def test_a_damaged_one_is_left_out_and_replaced(
        self, integer: Any, spoil: Any, reason: str
    ) -> None:
        file = measure(integer.path, ALL)
        spoil(file)
        with pytest.warns(EmbedgeWarning, match=f"not used: .*{reason}.*run `embedge prepare"):
            model = Embedder(integer.path, threads=2)
        assert model.encode("w1").shape == (8,)
        measure(integer.path, SINGLE)
        assert read_tuning(Bundle(integer.path), 2)["int8"].settings == SINGLE

    def test_another_machines_is_left_out_with_a_warning(
        self, integer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measure(integer.path, ALL)
        here = machine_name()
        monkeypatch.setattr(
            "embedge.runtime.sessions.prepared_graphs.processor_identity",
            lambda: "another processor",
        )
        with pytest.warns(
            EmbedgeWarning, match=f"another machine .*{here}; this is {machine_name()}"
        ):
            assert read_tuning(Bundle(integer.path), 2) == {}

    def test_that_of_another_graph_is_left_out_with_a_warning(self, integer: Any) -> None:
        file = measure(integer.path, ALL)
        edit(file, lambda d: d["threads"]["2"]["int8"].update(graph_sha256="0" * 64))
        with pytest.warns(EmbedgeWarning, match="not used for int8: measured with another graph"):
            assert read_tuning(Bundle(integer.path), 2) == {}

    def test_a_precision_that_the_bundle_no_longer_has_is_no_matter(self, integer: Any) -> None:
        file = measure(integer.path, ALL)
        edit(file, lambda d: d["threads"]["2"].update(int2=d["threads"]["2"]["int8"]))
        assert list(read_tuning(Bundle(integer.path), 2)) == ["int8"]

    def test_a_failed_write_leaves_the_old_one(
        self, integer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = measure(integer.path, ALL)
        before = file.read_bytes()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("embedge.runtime.bundle.writing.os.replace", full)
        with pytest.raises(OSError, match="No space"):
            measure(integer.path, SINGLE)
        assert file.read_bytes() == before
        assert list(file.parent.iterdir()) == [file]


class TestRuntime:
    def test_settings_decide_batches_and_sessions(
        self, integer: Any, runs: list[tuple[tuple[int, int], int]]
    ) -> None:
        texts = [f"w{i % 60} w{i // 60}" for i in range(256)]  # 4 tokens each
        measure(integer.path, replace(ALL, batch_tokens=64))
        Embedder(integer.path, threads=2).encode(texts, batch_size=1000)
        assert runs == [((16, 4), 2)] * 16
        runs.clear()
        measure(integer.path, replace(SINGLE, single_thread_tokens=8, batch_tokens=128))
        model = Embedder(integer.path, threads=2)
        model.encode(texts, batch_size=1000)
        assert runs == [((32, 4), 1)] * 8
        runs.clear()
        model.encode("w1 " * 6)
        model.encode("w1 " * 7)
        assert runs == [((1, 8), 1), ((1, 9), 2)]

    def test_a_graph_without_8_bit_matmuls_takes_single_threads_if_measured_so(
        self, bundle: Any, runs: list[tuple[tuple[int, int], int]]
    ) -> None:
        measure(bundle.path, SINGLE, precision="fp32")
        Embedder(bundle.path, threads=2).encode(TEXTS)
        assert {threads for _, threads in runs} == {1}

    def test_other_threads_run_by_the_defaults(
        self, integer: Any, runs: list[tuple[tuple[int, int], int]]
    ) -> None:
        measure(integer.path, replace(ALL, batch_tokens=64), threads=3)
        texts = [f"w{i % 60} w{i // 60}" for i in range(512)]
        Embedder(integer.path, threads=2).encode(texts, batch_size=1000)
        assert runs == [((CPU_BATCH_TOKENS_PER_THREAD // 4, 4), 1)] * 4

    def test_the_vision_tower_runs_by_the_defaults(
        self, with_images: Any, monkeypatch: Any
    ) -> None:
        made = {}
        init = SessionWorkers.__init__

        def recording(
            self: SessionWorkers, graph: Any, settings: RunSettings, **options: Any
        ) -> None:
            made[graph.name] = settings.single_thread_tokens
            init(self, graph, settings, **options)

        monkeypatch.setattr(SessionWorkers, "__init__", recording)
        measure(with_images.path, replace(ALL, single_thread_tokens=5), precision="fp32")
        Embedder(with_images.path, threads=2).encode_image(
            np.zeros((20, 30, 3), np.uint8), task="retrieval"
        )
        assert made == {"vision": SHORT, "retrieval": 5}

    @pytest.mark.parametrize("single_thread", [True, False])
    @pytest.mark.parametrize("batch_tokens", [1, 40, 100_000])
    @pytest.mark.parametrize("single_thread_tokens", [0, 1000])
    def test_vectors_do_not_depend_on_it(
        self, integer: Any, single_thread: bool, batch_tokens: int, single_thread_tokens: int
    ) -> None:
        expected = Embedder(integer.path, threads=2).encode(TEXTS)
        settings = RunSettings(
            single_thread=single_thread,
            single_thread_tokens=single_thread_tokens,
            batch_tokens=batch_tokens,
        )
        measure(integer.path, settings)
        model = Embedder(integer.path, threads=2)
        np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-6, rtol=0)
        np.testing.assert_allclose(model.encode(TEXTS[0]), expected[0], atol=1e-6, rtol=0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of one round: their figures mean nothing, their form does."""
    monkeypatch.setattr(timing, "_ROUNDS", 1)
    monkeypatch.setattr(timing, "_PAUSE_S", 0.0)
    monkeypatch.setattr(timing, "_BLOCK_S", 0.0)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    monkeypatch.setenv("COLUMNS", "200")


class Clock:
    """Time that passes in sleeps alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (timing, turns):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.mark.usefixtures("quick")
class TestCommand:
    @pytest.mark.slow
    def test_it_measures_every_precision_of_the_cpu(
        self, make_bundle: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tiny = make_bundle(
            precisions={"int8": INTEGER, "fp32": {}, "fp16": {"devices": ["cuda"]}},
            model={"max_length": 200},
        )
        arguments = ["prepare", str(tiny.path), "--measure-only", "--threads", "2"]
        assert main(arguments) == 0
        bundle = Bundle(tiny.path)
        tuning = read_tuning(bundle, 2)
        assert list(tuning) == ["int8", "fp32"]
        for precision, measured in tuning.items():
            assert list(measured.milliseconds) == ["1x16", "1x128", "32x64"]
            assert measured.graph_bytes == bundle.graph_bytes(precision, "retrieval")
        assert not tuning["fp32"].settings.single_thread
        head, columns, line, *rows = capsys.readouterr().out.splitlines()
        assert head.startswith("measured on 2 threads, milliseconds by texts x tokens, into ")
        assert columns.split() == ["precision", "1x16", "1x128", "32x64", "MB", "runs"]
        assert [row.split()[0] for row in rows] == ["int8", "fp32"]
        assert set(line) == {"-", " "}
        assert list(tuning_file(bundle).parent.iterdir()) == [tuning_file(bundle)]

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (
                RunSettings(single_thread=False, single_thread_tokens=0, batch_tokens=1024),
                "batches of 1024 tokens on all threads, one by one",
            ),
            (
                RunSettings(single_thread=True, single_thread_tokens=0, batch_tokens=512),
                "batches of 512 tokens on 1 thread each, at the same time; a text alone on all threads",
            ),
            (
                RunSettings(single_thread=True, single_thread_tokens=96, batch_tokens=512),
                "batches of 512 tokens on 1 thread each, at the same time; a text alone of up to 96 tokens "
                "on 1 thread",
            ),
        ],
    )
    def test_it_says_how_batches_and_single_texts_run(
        self,
        bundle: Any,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        settings: RunSettings,
        words: str,
    ) -> None:
        one = TunedPrecision(
            task="retrieval",
            graph_sha256="0" * 64,
            graph_bytes=10**6,
            milliseconds={"1x16": 1.0},
            settings=settings,
        )
        monkeypatch.setattr(
            prepare_module, "measure_precisions", lambda *_, **__: iter([{"fp32": one}])
        )
        assert main(["prepare", str(bundle.path), "--measure-only"]) == 0
        assert capsys.readouterr().out.splitlines()[-1].endswith(words)

    def test_it_packs_and_measures_and_removes_both(self, bundle: Any) -> None:
        assert main(["prepare", str(bundle.path)]) == 0
        folder = bundle.path / "prepared" / machine_name()
        assert sorted(path.name for path in folder.iterdir()) == ["fp32", "tuning.json"]
        assert main(["inspect", str(bundle.path), "--verify"]) == 0
        assert main(["prepare", str(bundle.path), "--remove"]) == 0
        assert not (bundle.path / "prepared").exists()

    def test_a_model_of_short_texts_is_measured_within_its_limit(self, bundle: Any) -> None:
        assert main(["prepare", str(bundle.path), "--measure-only", "--threads", "1"]) == 0
        tuning = read_tuning(Bundle(bundle.path), 1)
        assert list(tuning["fp32"].milliseconds) == ["1x16", "32x16"]

    @pytest.mark.filterwarnings("always")
    @pytest.mark.parametrize("busy", [True, False])
    def test_a_busy_machine_is_warned_of(
        self,
        bundle: Any,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        busy: bool,
    ) -> None:
        load = (os.cpu_count() or 1) + (1.5 if busy else 0.5)
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
        assert main(["prepare", str(bundle.path), "--measure-only"]) == 0
        assert (f"the machine is busy (load {load:.1f}" in capsys.readouterr().err) == busy

    def test_nothing_for_the_cpu_is_said(
        self, make_bundle: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tiny = make_bundle(precisions={"fp16": {"devices": ["cuda"]}})
        assert main(["prepare", str(tiny.path), "--measure-only"]) == 0
        assert "measured nothing" in capsys.readouterr().out
        assert not (tiny.path / "prepared").exists()

    @pytest.mark.parametrize("wrong", [["--threads", "0"], ["--pack-only", "--measure-only"]])
    def test_wrong_calls(self, bundle: Any, wrong: list[str]) -> None:
        assert main(["prepare", str(bundle.path), *wrong]) == 2


class TestTiming:
    """The decisions, from made-up times."""

    def measured(self, monkeypatch: Any, bundle: Any, cost: Callable[..., float]) -> TunedPrecision:
        """What is found where a run of some rows costs what a function says, in milliseconds."""
        run = timing._TimedGraph.run

        def fake(graph: Any, shape: Any, settings: RunSettings) -> Any:
            run(graph, shape, settings)()  # it does run
            return cost(shape, settings)

        monkeypatch.setattr(timing._TimedGraph, "run", fake)
        monkeypatch.setattr(timing, "medians_ms", lambda costs, seconds, **_: dict(costs))
        tasks = {"int8": "retrieval"}
        (found,) = timing.measure_precisions(Bundle(bundle.path), tasks, threads=2)
        return found["int8"]

    def test_equal_times_leave_the_defaults(self, integer: Any, monkeypatch: Any) -> None:
        found = self.measured(monkeypatch, integer, lambda shape, settings: 1.0)
        assert found.settings == SINGLE
        assert found.milliseconds == {"1x16": 1.0, "1x100": 1.0, "32x64": 1.0}

    def test_a_little_faster_is_noise(self, integer: Any, monkeypatch: Any) -> None:
        def cost(shape: Any, settings: RunSettings) -> float:
            return 0.97 if not settings.single_thread else 1.0

        assert self.measured(monkeypatch, integer, cost).settings == SINGLE

    def test_what_was_faster_only_once_is_not_taken(self, integer: Any, monkeypatch: Any) -> None:
        """As when another process takes a core for some seconds."""
        asked: dict[Any, int] = {}

        def cost(shape: Any, settings: RunSettings) -> float:
            key = shape, settings
            asked[key] = asked.get(key, 0) + 1
            disturbed = asked[key] == 1 and settings.single_thread == SINGLE.single_thread
            return 3.0 if disturbed and shape[0] > 1 else 1.0

        assert self.measured(monkeypatch, integer, cost).settings == SINGLE
        assert max(asked.values()) > 1

    def test_batches_on_all_threads_where_they_are_faster(
        self, integer: Any, monkeypatch: Any
    ) -> None:
        def cost(shape: Any, settings: RunSettings) -> float:
            return (3.0 if settings.single_thread else 2.0) + (settings.batch_tokens != 512)

        found = self.measured(monkeypatch, integer, cost)
        assert (found.settings.single_thread, found.settings.batch_tokens) == (False, 512)
        assert found.milliseconds["32x64"] == 2.0

    @pytest.mark.parametrize(
        ("amx", "at_16", "at_100", "expected"),
        [
            (True, 0.8, 0.8, 100),
            (True, 0.8, 1.2, 64),
            (True, 1.2, 1.2, 0),
            (True, 1.0, 1.2, 64),
            (False, 0.8, 0.8, 100),
            (False, 0.8, 1.2, 16),
            (False, 1.0, 1.2, 0),
        ],
    )
    def test_short_texts_take_one_thread_as_far_as_it_is_faster(
        self,
        integer: Any,
        monkeypatch: Any,
        amx: bool,
        at_16: float,
        at_100: float,
        expected: int,
    ) -> None:
        monkeypatch.setattr(batch_size, "has_amx", lambda: amx)

        def cost(shape: Any, settings: RunSettings) -> float:
            ratio = {16: at_16, 100: at_100}.get(shape[1], 1.0)
            single = settings.single_thread and shape[1] <= settings.single_thread_tokens
            return ratio if shape[0] == 1 and single else 1.0

        found = self.measured(monkeypatch, integer, cost)
        assert found.settings.single_thread_tokens == expected
        assert found.milliseconds["1x16"] == (1.0 if expected == 0 else at_16)
        assert found.milliseconds["1x100"] == (at_100 if expected == 100 else 1.0)

    def test_a_batch_that_takes_too_long_is_left_out(self, integer: Any, monkeypatch: Any) -> None:
        found = self.measured(monkeypatch, integer, lambda shape, settings: 60_000.0)
        assert list(found.milliseconds) == ["1x16", "1x100"]
        assert found.settings == SINGLE

    @pytest.mark.parametrize("together", [True, False])
    def test_precisions_are_timed_in_turn_where_memory_allows(
        self, two_tasks: Any, monkeypatch: Any, together: bool
    ) -> None:
        groups: list[int] = []
        medians = timing.medians_ms

        def recording(runs: Any, seconds: float, every: bool = False) -> Any:
            if every:
                groups.append(len(runs))
            return medians(runs, 0.0, every=every)

        monkeypatch.setattr(timing, "medians_ms", recording)
        if not together:
            monkeypatch.setattr(timing, "_TOGETHER_BYTES", 100)
        tasks = {"fp32": "code", "int4": "retrieval"}
        found = list(timing.measure_precisions(Bundle(two_tasks.path), tasks, threads=2))
        assert groups == ([2, 2] if together else [1, 1, 1, 1])  # a text alone, and a batch
        assert [list(group) for group in found] == (
            [["fp32", "int4"]] if together else [["fp32"], ["int4"]]
        )
        assert all(set(one.milliseconds) == {"1x16", "32x16"} for g in found for one in g.values())
        assert {p: one.task for group in found for p, one in group.items()} == tasks

    @pytest.mark.usefixtures("quick")
    def test_graphs_that_come_one_by_one_are_closed_before_the_next_ones_open(
        self, two_tasks: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alive: weakref.WeakSet[GraphSession] = weakref.WeakSet()
        together: list[set[str]] = []
        init = GraphSession.__init__

        def recording(self: GraphSession, *arguments: Any, **options: Any) -> None:
            init(self, *arguments, **options)
            alive.add(self)
            together.append({session.file.parent.name for session in alive})

        monkeypatch.setattr(GraphSession, "__init__", recording)
        monkeypatch.setattr(timing, "_TOGETHER_BYTES", 100)
        gc.disable()  # nothing may wait for it
        try:
            tasks = {"fp32": "code", "int4": "retrieval"}
            list(timing.measure_precisions(Bundle(two_tasks.path), tasks, threads=2))
        finally:
            gc.enable()
        assert together == [{"fp32"}, {"int4"}]
        assert not alive

    def test_time_that_is_short_leaves_the_first_run_alone(self, clock: Clock) -> None:
        calls: list[str] = []

        def slow() -> None:
            calls.append("slow")
            clock.sleep(0.05)

        runs = {"slow": slow, "other": lambda: calls.append("other")}
        assert timing.medians_ms(runs, 0.01)["slow"] == pytest.approx(50)
        assert calls == ["slow"]
        assert list(timing.medians_ms(runs, 0.15)) == ["slow"]
        assert "other" not in calls
        calls.clear()
        assert list(timing.medians_ms(runs, 0.01, every=True)) == ["slow", "other"]
        assert calls == ["slow", "other"]

    @pytest.mark.usefixtures("quick")
    def test_all_are_timed_where_there_is_time(self, clock: Clock) -> None:
        runs = {"a": lambda: clock.sleep(0.001), "b": lambda: clock.sleep(0.01)}
        assert timing.medians_ms(runs, 10) == pytest.approx({"a": 1, "b": 10})


def test_what_was_measured_of_a_bundle_that_cannot_be_written_lies_in_the_users_cache(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened = Bundle(bundle.path)
    graph = opened.manifest.precisions["fp32"].graphs["retrieval"]
    measured = TunedPrecision(
        task="retrieval",
        graph_sha256=opened.manifest.files[graph].sha256,
        graph_bytes=1,
        milliseconds={"1x16": 1.5},
        settings=RunSettings(single_thread=False, single_thread_tokens=0, batch_tokens=64),
    )
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        file = add_tuning(opened, 2, {"fp32": measured})
    assert file.is_relative_to(tmp_path / "cache")
    assert tuning_file(opened) == file
    assert read_tuning(opened, 2) == {"fp32": measured}
    inside = add_tuning(opened, 2, {"fp32": measured})
    assert not file.exists()
    assert tuning_file(opened) == inside == bundle.path / "prepared" / file.parent.name / file.name
