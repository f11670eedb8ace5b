"""The command on a tiny bundle: exported, measured, written, recorded."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedge import fit_maps
from embedge.bench import BenchOptions, Report, run_bench
from embedge.bench import plan as plan_module
from embedge.bench import run as run_module
from embedge.bench.errors import BenchError
from embedge.bench.options import Profile, Shape
from embedge.bench.report.write import report_json
from embedge.bench.systems.system import EmbedgeSystem
from embedge.runtime import DeviceError, Embedder, EmbedgeValueError, EmbedgeWarning
from embedge.runtime.cli.bench import add_arguments, run
from embedge.runtime.cli.main import main
from embedge.runtime.host.progress import LogLines
from embedge.runtime.sessions.device import cuda_problem

pytestmark = pytest.mark.slow

TINY = Profile(texts=24, rows=12, rounds=2, singles=3, invariance=6, warm_up=1, process_repeats=1)


@pytest.fixture(scope="module")
def bundle(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from embedge.export import export_bundle

    return export_bundle(
        model,
        adapters={"search": adapter, "plain": None},
        precisions=["fp32", "int8"],
        calibration="none",
        out=tmp_path_factory.mktemp("bundles") / "tiny",
        matryoshka_dims=[16, 32],
    )


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("labelled") / "held-out.jsonl"
    words = [f"{a}{b} {b}{a}" for a in "abcd" for b in "efgh"]
    rows = [{"query": word, "passage": f"{word} {word}"} for word in words]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def measured(bundle: Path, model: Path, adapter: Path, labelled: Path) -> Report:
    return run_bench(
        BenchOptions(
            bundle=bundle,
            reference=model,
            adapters={"search": adapter},
            evaluations=[("search", labelled)],
            peers=["none"],
            torch_types=["float32", "bfloat16"],
            threads=1,
            profile=TINY,
        )
    )


def test_every_task_has_a_row_for_each_system(measured: Report) -> None:
    systems = ["torch fp32", "torch bf16", "embedge fp32", "embedge int8"]
    assert [(row.task, row.system) for row in measured.rows] == [
        (task, system) for task in ("search", "plain") for system in systems
    ]


@pytest.mark.parametrize("task", ["search", "plain"])
def test_fp32_graphs_equal_the_reference_at_every_dimension(measured: Report, task: str) -> None:
    row = measured.row(task, "embedge fp32")

    assert row is not None
    assert list(row.fidelity) == ["32", "16"]
    assert min(figures["cosine_min"] for figures in row.fidelity.values()) >= 0.999999  # target 1


def test_whole_vectors_are_compared_whatever_a_call_gives(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    document = json.loads((copy / "manifest.json").read_text())
    document["model"]["truncate_dim"] = 16
    (copy / "manifest.json").write_text(json.dumps(document))
    system = EmbedgeSystem(copy, "plain", "fp32", threads=1)
    assert system.encode(["a text"]).shape == (1, 32)
    tokens = np.array([[2, 5, 3]])
    assert system.forward(tokens, np.ones_like(tokens)).shape == (1, 32)


def test_maps_have_a_row_beside_the_graphs(
    bundle: Path, model: Path, adapter: Path, labelled: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    texts = [f"{a}{b} {b}{c}" for a in "abcdef" for b in "ghijk" for c in "lmn"]
    with pytest.warns(EmbedgeWarning, match="maps of 90 texts"):
        fit_maps(copy, texts, base="search", precisions=["fp32"])
    report = run_bench(
        BenchOptions(
            bundle=copy,
            reference=model,
            adapters={"search": adapter},
            evaluations=[("search", labelled)],
            peers=["none"],
            precisions=["fp32"],
            threads=1,
            profile=replace(TINY, process_repeats=0),
        )
    )
    base, other = (report.row(task, "embedge fp32, maps") for task in ("search", "plain"))
    assert base is not None
    assert other is not None
    assert base.fidelity["32"]["cosine_min"] >= 0.999999
    assert 0 < other.fidelity["32"]["cosine_mean"] < 1
    assert other.invariance["cosine_min"] >= 0.999999
    assert base.quality["held-out"]["items"] == 12
    assert base.shapes["1x16"]["median_ms"] > 0
    assert base.precision is None  # no configuration that `choose` may give


def test_each_row_holds_speed_quality_and_bytes(measured: Report) -> None:
    row = measured.row("search", "embedge int8")

    assert row is not None
    assert row.bytes_on_disk
    assert list(row.shapes) == ["1x16"]  # the model takes 24 tokens
    assert row.shapes["1x16"]["rounds"] == 8
    assert row.single["p50_ms"] <= row.single["p95_ms"]
    assert row.quality["held-out"]["items"] == 12
    assert row.invariance["cosine_min"] >= 0.999999  # target 3
    figures = row.quality["held-out"]
    assert list(figures["formats"]) == ["float32", "float16", "int8", "binary", "binary+int8"]
    assert list(figures["formats"]["int8"]) == ["32", "16"]
    assert figures["formats"]["float32"]["32"] == figures["dims"]["32"]
    assert list(figures["queries"]) == ["fp32", "int8"]
    assert figures["queries"]["int8"] == figures["dims"]["32"]


def test_a_process_of_its_own_reports_start_switch_and_memory(measured: Report) -> None:
    figures = measured.process["embedge int8"]

    assert 0 < figures["imported_ms"] < figures["first_vector_ms"]
    assert figures["switch_graph_open_ms"] > 0
    assert figures["after_batches"].get("peak", 1) > 0
    assert measured.process["torch fp32"]["first_vector_ms"] > 0


def test_the_command_writes_reports_and_records(
    bundle: Path, model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = [str(bundle), "--reference", str(model), "--adapter", f"search={adapter}"]
    arguments += [
        "--precision",
        "fp32",
        "--target",
        "1",
        "3",
        "--threads",
        "1",
        "--record",
        "--json",
    ]

    status = run(parser.parse_args([*arguments, "--out", str(tmp_path / "report")]))

    output = capsys.readouterr().out
    assert status == 0
    assert "pass  target 1  search min cosine" in output
    assert json.loads(output.splitlines()[-1])["report_version"] == "1.2"
    assert (tmp_path / "report" / "report.md").is_file()
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["precisions"]["fp32"]["fidelity"]["search"]["texts"] >= 500
    assert "embedge fp32" in (bundle / "README.md").read_text()


def test_what_auto_advises_makes_it_choose(
    bundle: Path, model: Path, adapter: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text())
    for precision in manifest["precisions"].values():
        precision["fidelity"] = {}
    file.write_text(json.dumps(manifest))
    with pytest.raises(EmbedgeValueError) as caught:
        Embedder(copy, precision="auto", min_cosine=0.9)
    advised = re.search("`embedge (bench .*)`", str(caught.value))
    assert advised
    command = advised[1].replace("MODEL", str(model)).replace("FOLDER", str(adapter)).split()
    # Less of it, for a test.
    less = ["--bar", "1", "--limit", "16", "--threads", "1", "--precision", "int8"]

    main([*command, *less, "--out", str(tmp_path / "report")])

    assert Embedder(copy, precision="auto", min_cosine=0.9).precision == "int8"


def test_the_command_compares_systems_at_named_shapes(
    bundle: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = [str(bundle), "--reference", str(model), "--task", "plain", "--threads", "1"]
    arguments += ["--shapes", "1x4", "3x8", "1x64", "--rounds", "1", "--limit", "16"]
    arguments += ["--torch-types", "float32", "bfloat16"]
    arguments += ["--peers", "torch:int8", "--json", "--out", str(tmp_path / "report")]

    status = run(parser.parse_args(arguments))

    output, errors = capsys.readouterr()
    assert "step" not in errors  # no progress bar but on a terminal
    assert status == 0
    assert "3x8 / embedge int8" in output
    assert "note: 1x64 was not timed: the model takes 24 tokens" in output
    report = Report.from_dict(json.loads(output.splitlines()[-1]))
    systems = ["torch fp32", "torch bf16", "torch dynamic int8", "embedge fp32", "embedge int8"]
    assert [row.system for row in report.rows] == systems
    for row in report.rows:
        assert list(row.shapes) == ["1x4", "3x8"]
        assert row.full_fidelity["cosine_min"] > 0.9
        assert row.full_fidelity.keys() >= {"pair_spearman", "top10_overlap"}
        assert not row.single
        assert not row.invariance
    assert report.settings["texts"] == 16
    assert not report.process


def test_peers_are_built_for_as_many_tasks_as_the_profile_says(
    bundle: Path, model: Path, adapter: Path
) -> None:
    said: list[str] = []

    class Said(LogLines):
        def say(self, message: Callable[[], str]) -> None:
            said.append(message())

    report = run_bench(
        BenchOptions(
            bundle=bundle,
            reference=model,
            adapters={"search": adapter},
            peers=["torch:int8"],
            torch_types=["float32"],
            precisions=["int8"],
            threads=1,
            profile=replace(TINY, peer_tasks=1, latency_tasks=0, process_repeats=0),
        ),
        lines=Said(),
    )

    names = ["torch fp32", "torch dynamic int8", "embedge int8"]
    expected = [("search", name) for name in names] + [("plain", names[0]), ("plain", names[2])]
    assert [(row.task, row.system) for row in report.rows] == expected
    assert "peers were measured on search alone" in report.notes
    assert report.settings["peer_tasks"] == ["search"]
    numbers = [tuple(map(int, re.findall(r"^step (\d+) of (\d+)", line)[0])) for line in said]
    assert numbers == [(number, 8) for number in range(1, 9)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "8-64"], "--shapes 8-64: expected BATCHxTOKENS, such as 8x64"),
        (["--rounds", "0"], "--rounds 0: expected a number from 1"),
        (["--limit", "10"], "--limit 10: expected a number from 11"),
    ],
)
def test_a_number_that_cannot_be_is_refused(
    arguments: list[str], message: str, bundle: Path, model: Path
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    with pytest.raises(BenchError, match=message):
        run(parser.parse_args([str(bundle), "--reference", str(model), *arguments]))


@pytest.mark.parametrize("place", ["adapters", "adapters/search"])
def test_adapters_that_the_reference_brings_need_no_option(
    place: str, bundle: Path, model: Path, adapter: Path, tmp_path: Path
) -> None:
    brings = tmp_path / "model"
    shutil.copytree(model, brings)
    shutil.copytree(adapter, brings / place)
    plan = plan_module.make_plan(BenchOptions(bundle=bundle, reference=brings, peers=["none"]))
    assert plan.adapters == {"search": brings / place}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": {}}, "search were merged from adapters; .* add --adapter search=FOLDER"),
        ({"adapters": {"other": Path()}}, "--adapter other: the bundle's tasks are search, plain"),
        ({"tasks": ["other"]}, "--task other: not measurable in this bundle; it has: search"),
        ({"precisions": ["int4"]}, "--precision int4: .* it has: fp32, int8"),
    ],
    ids=["no adapter", "unknown adapter", "unknown task", "unknown precision"],
)
def test_a_call_that_does_not_fit_the_bundle_is_refused(
    change: dict[str, Any], message: str, bundle: Path, model: Path, adapter: Path
) -> None:
    options = BenchOptions(bundle=bundle, reference=model, adapters={"search": adapter})

    with pytest.raises(BenchError, match=message):
        run_bench(replace(options, **change))


def test_a_device_that_does_not_work_here_is_refused_before_anything_is_loaded(
    bundle: Path, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "cuda_problem", lambda: "no provider")
    adapters = {"search": adapter}
    with pytest.raises(DeviceError, match="^--device cuda: no provider"):
        run_bench(BenchOptions(bundle=bundle, reference=model, adapters=adapters, device="cuda"))
    with pytest.raises(BenchError, match="^--device gpu: expected one of cpu, cuda"):
        BenchOptions(bundle=bundle, reference=model, device="gpu")
    with pytest.raises(BenchError, match="^--peers openvino: they run on the CPU"):
        BenchOptions(bundle=bundle, reference=model, device="cuda", peers=["openvino"])


@pytest.mark.skipif(
    cuda_problem() is not None or not torch.cuda.is_available(),
    reason="needs ONNX Runtime's CUDA provider, a CUDA build of torch, and a GPU",
)
def test_a_gpu_is_measured_against_torch_on_it(model: Path, adapter: Path, tmp_path: Path) -> None:
    from embedge.export import export_bundle

    bundle = export_bundle(
        model, adapters={"search": adapter}, precisions=["fp16", "int8"], out=tmp_path / "tiny"
    )
    options = BenchOptions(
        bundle=bundle,
        reference=model,
        adapters={"search": adapter},
        profile=TINY,
        device="cuda",
        shapes=[Shape(batch=2, tokens=8)],
    )
    report = run_bench(options)
    rows = {row.system: row for row in report.rows}
    assert set(rows) == {"torch fp32", "torch bf16", "torch fp16", "embedge fp16"}
    assert rows["embedge fp16"].full_fidelity["cosine_mean"] > 0.9999
    assert rows["embedge fp16"].shapes["2x8"]["median_ms"] > 0
    assert report.machine["gpu"]
    assert set(report.process) == {"embedge fp16", "torch fp32"}


def test_several_bundles_stand_in_one_report_and_can_be_chosen_from(
    bundle: Path,
    model: Path,
    adapter: Path,
    labelled: Path,
    measured: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    of_processes = measured.process["embedge int8"]  # measured once, above
    monkeypatch.setattr(run_module, "measure_process", lambda *_: of_processes)
    other = shutil.copytree(bundle, tmp_path / "other")
    out = tmp_path / "report"
    common = ["--reference", str(model), "--adapter", f"search={adapter}", "--task", "search"]
    common += ["--precision", "int8", "--threads", "1", "--rounds", "1", "--limit", "12"]
    common += ["--eval", f"search={labelled}", "--peers", "none", "--quick", "--out", str(out)]

    assert main(["bench", str(bundle), str(other), *common]) == 0

    document = json.loads((out / "report.json").read_text())
    assert [report["bundle"] for report in document["reports"]] == ["tiny", "other"]
    assert {c["bundle"] for c in document["configurations"]} == {"tiny", "other"}
    of_other = Report.from_dict(document["reports"][1])
    assert [row.system for row in of_other.rows] == ["embedge int8"]
    assert (out / "report.html").is_file()
    assert (out / "other" / "report.md").is_file()
    capsys.readouterr()
    assert main(["choose", str(out), "--max-memory", "10GB", "--max-index", "1GB"]) == 0
    assert capsys.readouterr().out.startswith("int8, ")


@pytest.mark.parametrize("output_format", ["float32", "int8", "binary", "binary+int8"])
def test_what_choose_prints_prepares_and_runs(
    output_format: str,
    measured: Report,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    shutil.copytree(bundle, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    rows = []
    for row in measured.rows:
        if row.precision is not None and row.task == "search":
            its = dict(row.quality["held-out"])
            its["formats"] = {output_format: its["formats"][output_format]}
            rows.append(replace(row, quality={"held-out": its}))
    (tmp_path / "report.json").write_text(report_json(replace(measured, rows=tuple(rows))))
    Path("FILE").write_text("\n".join(f"text {number}" for number in range(300)))
    assert main(["choose", "report.json", "--max-index", "5GB", "--task", "search", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)

    for line in answer["prepare"]:
        assert main(shlex.split(line)[1:]) == 0
    names: dict[str, Any] = {"texts": [f"abc {n}" for n in range(12)], "questions": ["abc"]}
    exec("\n".join(answer["code"]), names)

    assert answer["chosen"]["output_format"] == output_format
    assert len(names["documents"]) == 12
    if output_format == "binary+int8":
        assert names["rows"].shape == (1, 10)
    else:
        assert names["documents"].dtype == {"float32": "float32"}.get(output_format, "int8")
    bytes_of_a_million = 1_000_000 * names["documents"][0].nbytes
    if output_format != "binary+int8":
        assert bytes_of_a_million == answer["chosen"]["index"]


def test_bundles_of_one_name_are_refused(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    again = tmp_path / "tiny"
    assert main(["bench", str(bundle), str(again), "--reference", "model"]) == 2
    assert "expected folders of different names" in capsys.readouterr().err
