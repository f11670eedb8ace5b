"""precision="auto" under limits; times and fidelity are made up, so that no clock decides a test."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder, EmbedgeValueError
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.cli.main import main
from embedge.runtime.sessions.session_workers import RunSettings
from embedge.runtime.tuning import choose_precision as auto_module
from embedge.runtime.tuning.cache import TunedPrecision, add_tuning
from tests.helpers.threads import in_threads

THREADS = 2
SETTINGS = RunSettings(single_thread=False, single_thread_tokens=0, batch_tokens=1024)
CPU_PRECISIONS = ("fp32", "int4", "int4-unpacked", "int8")


def recorded(mean: Any, dim: int = 8) -> dict[str, Any]:
    """A task's figures, as `bench --record` writes them."""
    return {
        "reference": "torch",
        "dims": {"4": {"cosine_mean": 0.1}, str(dim): {"cosine_mean": mean}},
    }


def measure(path: Any, times: Mapping[str, Mapping[str, float]], threads: int = THREADS) -> None:
    """Stores made-up milliseconds by precision and shape."""
    bundle = Bundle(path)
    manifest = bundle.manifest
    add_tuning(
        bundle,
        threads,
        {
            precision: TunedPrecision(
                task="retrieval",
                graph_sha256=manifest.files[
                    manifest.precisions[precision].graphs["retrieval"]
                ].sha256,
                graph_bytes=bundle.graph_bytes(precision, "retrieval"),
                milliseconds=by_shape,
                settings=SETTINGS,
            )
            for precision, by_shape in times.items()
        },
    )


def chosen(path: Any, **limits: Any) -> str:
    return Embedder(
        path, precision="auto", **{"threads": THREADS, "device": "cpu", **limits}
    ).precision


@pytest.fixture
def several(make_bundle: Any) -> Any:
    """Four precisions of the CPU and one of CUDA alone; fp32 has no figures."""
    figures = {"int4": 0.98, "int4-unpacked": 0.98, "int8": 0.999}
    return make_bundle(
        "several",
        precisions={
            **{
                name: {
                    "fidelity": {"retrieval": recorded(figures[name])} if name in figures else {}
                }
                for name in CPU_PRECISIONS
            },
            "fp16": {"devices": ["cuda"], "fidelity": {"retrieval": recorded(0.9999)}},
        },
    )


class TestOrder:
    def test_without_measurements_it_is_fixed(self, several: Any) -> None:
        assert chosen(several.path) == "int8"

    def test_the_fastest_measured_is_taken(self, several: Any) -> None:
        measure(several.path, {"int8": {"1x16": 4.0}, "int4": {"1x16": 3.0}, "fp32": {"1x16": 9.0}})
        assert chosen(several.path) == "int4"

    def test_every_shape_weighs_the_same(self, several: Any) -> None:
        times = {"int8": {"1x16": 1.0, "32x64": 300.0}, "int4": {"1x16": 2.0, "32x64": 100.0}}
        measure(several.path, times)
        assert chosen(several.path) == "int4"

    def test_shapes_that_not_all_have_do_not_count(self, several: Any) -> None:
        times = {"int8": {"1x16": 1.0, "32x64": 300.0}, "int4": {"1x16": 2.0}}
        measure(several.path, times)
        assert chosen(several.path) == "int8"

    def test_what_is_as_fast_goes_by_the_fixed_order(self, several: Any) -> None:
        measure(several.path, {"int8": {"1x16": 1.09}, "int4-unpacked": {"1x16": 1.0}})
        assert chosen(several.path) == "int8"
        measure(several.path, {"int8": {"1x16": 1.11}})
        assert chosen(several.path) == "int4-unpacked"

    def test_one_that_was_not_measured_keeps_its_place(self, several: Any) -> None:
        """int4 measured alone says nothing about int8, which usually is faster."""
        measure(several.path, {"int4": {"1x16": 1.0}})
        assert chosen(several.path) == "int8"

    def test_other_threads_are_another_measurement(self, several: Any) -> None:
        measure(several.path, {"int8": {"1x16": 4.0}, "int4": {"1x16": 3.0}}, threads=THREADS + 1)
        assert chosen(several.path) == "int8"
        assert chosen(several.path, threads=THREADS + 1) == "int4"

    def test_the_choice_is_logged_with_its_reason(
        self, several: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        measure(several.path, {"int8": {"1x16": 4.0}, "int4": {"1x16": 3.0}})
        with caplog.at_level(logging.INFO, "embedge.runtime"):
            chosen(several.path)
        assert caplog.messages == [
            "precision auto: int4 on cpu, measured over 1 shapes: int8 4 ms, int4 3 ms; "
            "fp16 does not run on cpu"
        ]

    def test_names_that_have_no_place_come_last(self, make_bundle: Any) -> None:
        tiny = make_bundle(precisions={"int2": {}, "fp32": {}})
        assert chosen(tiny.path) == "fp32"


class TestDevice:
    @pytest.fixture
    def mixed(self, make_bundle: Any) -> Any:
        both = {"devices": ["cpu", "cuda"]}
        return make_bundle(
            precisions={"int8": {}, "int4": both, "fp32": both, "fp16": {"devices": ["cuda"]}}
        )

    @pytest.mark.parametrize(
        ("problem", "device", "expected"),
        [
            (None, "auto", "fp16"),
            (None, "cpu", "int8"),
            (None, "cuda", "fp16"),
            ("no driver", "auto", "int8"),
        ],
    )
    def test_it_decides_which_can_be_taken(
        self, mixed: Any, monkeypatch: pytest.MonkeyPatch, problem: Any, device: str, expected: str
    ) -> None:
        monkeypatch.setattr(auto_module, "cuda_problem", lambda: problem)
        bundle = Bundle(mixed.path)
        assert auto_module.choose_automatically(bundle, {}, device=device) == expected

    def test_times_of_the_cpu_say_nothing_about_cuda(
        self, mixed: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(auto_module, "cuda_problem", lambda: None)
        bundle = Bundle(mixed.path)
        tuning = {
            p: TunedPrecision(
                task="retrieval",
                graph_sha256="",
                graph_bytes=1,
                milliseconds={"1x16": ms},
                settings=SETTINGS,
            )
            for p, ms in (("fp16", 9.0), ("int4", 1.0))
        }
        assert auto_module.choose_automatically(bundle, tuning, device="auto") == "fp16"

    def test_one_without_a_precision_is_refused(self, several: Any) -> None:
        with pytest.raises(EmbedgeValueError, match="device is 'tpu'; expected one of"):
            chosen(several.path, device="tpu")


class TestLimits:
    @pytest.fixture
    def sized(self, make_bundle: Any) -> Any:
        """int4 is smaller than int8: its graph file is cut to what it needs."""
        tiny = make_bundle(precisions={"int8": {}, "int4": {}})
        graph = tiny.path / "int8" / "retrieval.onnx"
        import onnx

        model = onnx.load(graph, load_external_data=False)
        model.doc_string = "x" * 5000
        graph.write_bytes(model.SerializeToString())
        tiny.edit(lambda m: m["files"]["int8/retrieval.onnx"].update(size=graph.stat().st_size))
        return tiny

    def test_memory(self, sized: Any) -> None:
        size = {p: Bundle(sized.path).graph_bytes(p, "retrieval") for p in ("int8", "int4")}
        assert chosen(sized.path, memory_limit=size["int8"]) == "int8"
        assert chosen(sized.path, memory_limit=size["int8"] - 1) == "int4"
        with pytest.raises(EmbedgeValueError) as caught:
            chosen(sized.path, memory_limit=size["int4"] - 1)
        limit = f"above memory_limit ({size['int4'] - 1})"
        assert str(caught.value).endswith(
            f"no precision keeps the limits: int8 takes {size['int8']} bytes, {limit}; "
            f"int4 takes {size['int4']} bytes, {limit}"
        )

    def test_memory_counts_the_vision_tower(self, with_images: Any) -> None:
        bundle = Bundle(with_images.path)
        tower = bundle.graph_bytes("fp32", "vision")
        task = max(bundle.graph_bytes("fp32", name) for name in ("retrieval", "code"))
        assert chosen(with_images.path, memory_limit=max(tower, task)) == "fp32"
        with pytest.raises(EmbedgeValueError, match="above memory_limit"):
            chosen(with_images.path, memory_limit=max(tower, task) - 1)

    def test_fidelity(self, several: Any) -> None:
        measure(several.path, {"int8": {"1x16": 4.0}, "int4": {"1x16": 3.0}})
        assert chosen(several.path, min_cosine=0.98) == "int4"
        assert chosen(several.path, min_cosine=0.981) == "int8"
        with pytest.raises(EmbedgeValueError) as caught:
            chosen(several.path, min_cosine=0.9995)
        message = str(caught.value)
        assert "int8 has a mean cosine of 0.999 at retrieval, below min_cosine (0.9995)" in message
        assert "fp32 has no recorded fidelity of retrieval" in message
        assert "fp16 does not run on cpu" in message
        assert message.endswith(
            f"; to record it, run `embedge bench {several.path} --reference MODEL "
            "--adapter retrieval=FOLDER --record`, MODEL being tiny's folder"
        )
        assert message.count("embedge bench") == 1

    def test_where_all_is_recorded_nothing_is_to_be_run(self, make_bundle: Any) -> None:
        tiny = make_bundle(precisions={"int8": {"fidelity": {"retrieval": recorded(0.9)}}})
        with pytest.raises(EmbedgeValueError, match=r"below min_cosine \(0\.95\)$"):
            chosen(tiny.path, min_cosine=0.95)

    def test_the_worst_task_decides(self, make_bundle: Any) -> None:
        figures = {"retrieval": recorded(0.999), "code": recorded(0.95)}
        tiny = make_bundle(
            tasks=("retrieval", "code"),
            precisions={"int8": {"fidelity": figures}, "fp32": {"fidelity": {}}},
        )
        assert chosen(tiny.path, min_cosine=0.95) == "int8"
        with pytest.raises(EmbedgeValueError, match="mean cosine of 0.95 at code"):
            chosen(tiny.path, min_cosine=0.96)

    @pytest.mark.parametrize(
        "figures",
        [{}, {"dims": []}, {"dims": {"4": {"cosine_mean": 1}}}, recorded("1"), recorded(True)],
    )
    def test_figures_of_another_kind_are_none(self, make_bundle: Any, figures: Any) -> None:
        tiny = make_bundle(precisions={"int8": {"fidelity": {"retrieval": figures}}})
        with pytest.raises(EmbedgeValueError, match="int8 has no recorded fidelity of retrieval"):
            chosen(tiny.path, min_cosine=0.5)

    def test_every_task_and_the_tower_are_needed(self, make_bundle: Any) -> None:
        two = make_bundle("two", tasks=("retrieval", "code"), precisions={"int8": {}, "int4": {}})
        two.edit(lambda m: m["precisions"]["int8"]["graphs"].pop("code"))
        assert chosen(two.path) == "int4"
        images = make_bundle("i", images=True, precisions={"int8": {}, "int4": {}})
        images.edit(lambda m: m["precisions"]["int8"].update(vision=None))
        assert chosen(images.path) == "int4"

    @pytest.mark.parametrize("wrong", [0, -1, 1.01, True, "0.9", float("nan")])
    def test_a_cosine_that_is_none_is_refused(self, several: Any, wrong: Any) -> None:
        with pytest.raises(EmbedgeValueError, match="min_cosine is .*; expected a number above 0"):
            chosen(several.path, min_cosine=wrong)

    def test_a_named_precision_takes_no_cosine(self, several: Any) -> None:
        with pytest.raises(EmbedgeValueError, match='min_cosine goes with precision="auto"'):
            Embedder(several.path, precision="int8", min_cosine=0.9)


def test_vectors_are_those_of_the_precision_by_name(several: Any) -> None:
    texts = ["w1 w2", "w3", "w4 w5 w6"]
    expected = Embedder(several.path, precision="int8", threads=THREADS).encode(texts)
    found = Embedder(several.path, precision="auto", threads=THREADS, device="cpu").encode(texts)
    np.testing.assert_array_equal(found, expected)


def test_another_process_takes_the_same_precision(several: Any) -> None:
    """Vectors that meet later are of one precision, whatever was measured in between."""
    model = Embedder(several.path, precision="auto", threads=THREADS, device="cpu", min_cosine=0.9)
    before = pickle.dumps(model)
    measure(several.path, {"int8": {"1x16": 4.0}, "int4": {"1x16": 3.0}})
    assert pickle.loads(before).precision == model.precision == "int8"
    assert chosen(several.path) == "int4"


@pytest.mark.slow
def test_several_threads_share_one(several: Any) -> None:
    limits: dict[str, Any] = {"memory_limit": 1_000_000, "device": "cpu"}
    model = Embedder(several.path, precision="auto", threads=THREADS, **limits)
    texts = [f"w{i}" for i in range(40)]
    expected = model.encode(texts)

    def work() -> None:
        for _ in range(5):
            np.testing.assert_allclose(model.encode(texts, batch_size=8), expected, atol=1e-6)

    in_threads(*[work] * 4)


class TestCommand:
    @pytest.fixture
    def embed(self, several: Any, tmp_path: Any) -> Callable[..., int]:
        source = tmp_path / "texts"
        source.write_text("w1 w2\n")
        command = ["embed", str(several.path), "--input", str(source), "--device", "cpu"]
        return lambda *options: main([*command, "--precision", *options])

    def test_auto_with_limits(self, several: Any, embed: Any, capsys: Any) -> None:
        assert embed("auto", "--memory-limit", "1.5MB", "--min-cosine", "0.99") == 0
        vector = json.loads(capsys.readouterr().out)["embedding"]
        expected = Embedder(several.path, precision="int8").encode("w1 w2")
        np.testing.assert_allclose(vector, expected, atol=1e-6)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["auto", "--memory-limit", "1KB"], "takes "),
            (
                ["auto", "--memory-limit", "much"],
                "--memory-limit 'much': expected a number of bytes",
            ),
            (["auto", "--min-cosine", "0.99995"], "no precision keeps the limits"),
            (["int8", "--min-cosine", "0.9"], "--min-cosine goes with --precision auto"),
        ],
    )
    def test_what_cannot_be_kept_is_a_wrong_call(
        self, embed: Any, capsys: Any, options: list[str], message: str
    ) -> None:
        assert embed(*options) == 2
        assert message in capsys.readouterr().err

    def test_verbose_says_which(
        self, embed: Any, several: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, "embedge.runtime"):
            assert embed("auto", "--verbose") == 0
        assert any(
            m.startswith("precision auto: int8 on cpu, by the fixed order") for m in caplog.messages
        )
