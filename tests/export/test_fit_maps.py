"""Maps in a bundle: the graph is what torch computes of the base's states, and the runtime gives what it makes."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
import pytest
import torch
from onnx import numpy_helper

from embedge import fit_maps
from embedge.export import export_bundle
from embedge.quant.task_maps import TaskMaps
from embedge.runtime import Embedder, subset_bundle
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.cli.main import main
from embedge.runtime.errors import EmbedgeValueError, EmbedgeWarning
from tests.helpers.command import Capture, error_line
from tests.helpers.exports import WIDE, manifest
from tests.helpers.models import (
    Reference,
    cosines,
    make_model,
    random_texts,
    save,
    save_adapter,
)

TASKS = ("mix", "second", "third")
TEXTS = random_texts(240, longest=24, seed=1)
FRESH = random_texts(24, longest=24, seed=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("bert", **WIDE), tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def loras(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loras")
    return {
        name: save_adapter(model, root / name, target=["query", "value"], seed=seed)
        for seed, name in enumerate(TASKS, 50)
    }


def fit(bundle: Path, texts: list[str] = TEXTS, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmbedgeWarning)  # of few texts
        return fit_maps(bundle, texts, **{"base": "mix", "layers": 1, **options})


@pytest.fixture(scope="module")
def plain(model: Path, loras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without maps."""
    return export_bundle(
        model,
        adapters=loras,
        precisions=["fp32", "int8"],
        calibration="none",
        out=tmp_path_factory.mktemp("plain") / "bundle",
        matryoshka_dims=[16, 96],
    )


@pytest.fixture(scope="module")
def mapped(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(plain, tmp_path_factory.mktemp("mapped") / "bundle")
    fit(copy)
    return copy


@pytest.fixture
def copy(mapped: Path, tmp_path: Path) -> Path:
    """A bundle with maps, to change."""
    return shutil.copytree(mapped, tmp_path / "copy")


def map_weights(bundle: Path) -> dict[str, torch.Tensor]:
    """What the maps' graph holds, by its initializers' names."""
    name = manifest(bundle)["precisions"]["fp32"]["maps"]["graph"]
    graph = onnx.load(str(bundle / name), load_external_data=False)
    found = {}
    for tensor in graph.graph.initializer:
        if not tensor.name.startswith("maps.") or "const" in tensor.name:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(bundle / "fp32"))
        found[tensor.name.removeprefix("maps.")] = torch.from_numpy(
            numpy_helper.to_array(tensor).copy()
        )
    return found


def expected_vectors(model: Path, adapter: Path, bundle: Path) -> torch.Tensor:
    """By torch and PEFT: the base's vector, the mean of its states before the last layer, then the stored maps."""
    reference = Reference(model, adapter)
    w = map_weights(bundle)
    rows = []
    for text in FRESH:
        ids = torch.tensor([reference.tokenizer.encode(text).ids])
        with torch.no_grad():
            states = reference.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
            ).hidden_states
        own = torch.nn.functional.normalize(states[-1][0].mean(0), dim=0)
        x = torch.cat([own, states[1][0].mean(0)])
        y = x @ w["linear"] + w["offset"]
        if "inner" in w:
            y = y + torch.nn.functional.gelu(x @ w["inner"] + w["inner_offset"]) @ w["outer"]
        others = torch.nn.functional.normalize(y.reshape(2, -1), dim=-1)
        rows.append(torch.cat([own[None], others]))
    return torch.stack(rows)


def test_one_pass_gives_what_torch_makes_of_the_bases_states(
    mapped: Path, model: Path, loras: dict[str, Path]
) -> None:
    expected = expected_vectors(model, loras["mix"], mapped)
    found = Embedder(mapped, precision="fp32").encode_tasks(FRESH)
    assert list(found) == list(TASKS)
    for row, task in enumerate(TASKS):
        assert np.abs(found[task] - expected[:, row].numpy()).max() < 2e-5, task


def test_a_network_is_what_torch_makes_of_it(
    copy: Path, model: Path, loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(x: Any, vectors: Any, *_: Any, **__: Any) -> TaskMaps:
        random = np.random.default_rng(3)
        shapes = {"linear": (192, 192), "offset": (192,), "inner": (192, 8)}
        shapes |= {"inner_offset": (8,), "outer": (8, 192)}
        made = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
        return TaskMaps(tasks=tuple(vectors), normalize=True, **made)

    monkeypatch.setattr(sys.modules[fit_maps.__module__], "fit_task_maps", network)
    fit(copy, precisions=["fp32"], hidden=8, overwrite=True)
    expected = expected_vectors(model, loras["mix"], copy)
    found = Embedder(copy, precision="fp32").encode_tasks(FRESH)
    for row, task in enumerate(TASKS):
        assert np.abs(found[task] - expected[:, row].numpy()).max() < 1e-4, task


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_maps_come_nearer_to_a_task_than_the_base_does(mapped: Path, precision: str) -> None:
    model = Embedder(mapped, precision=precision)
    found = model.encode_tasks(FRESH)
    own = {task: model.encode(FRESH, task=task) for task in TASKS}
    assert cosines(found["mix"], own["mix"]).min() > 0.999999
    for task in ("second", "third"):
        left = 1 - cosines(found[task], own[task]).mean()
        assert left < 0.5 * (1 - cosines(own["mix"], own[task]).mean()), task


def test_what_the_manifest_says_of_them(mapped: Path, plain: Path) -> None:
    document = manifest(mapped)
    assert document["format_version"] == "1.8"
    for precision in ("fp32", "int8"):
        maps = document["precisions"][precision]["maps"]
        assert (maps["base"], maps["tasks"]) == ("mix", list(TASKS))
        assert maps["texts"] + 2 * len(maps["fidelity"]) < len(TEXTS)
        assert maps["fidelity"]["mix"]["cosine_mean"] == pytest.approx(1, abs=1e-6)
        assert 0.9 < maps["fidelity"]["second"]["cosine_mean"] < 1
        assert maps["fidelity"]["second"]["texts"] == len(TEXTS) // 10
    before = manifest(plain)
    assert document["tasks"] == before["tasks"]
    assert before["files"].items() <= document["files"].items()
    assert not Bundle(mapped).problems(hashes=True)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_vector_does_not_depend_on_its_batch(mapped: Path, precision: str) -> None:
    model = Embedder(mapped, precision=precision)
    together = model.encode_tasks(FRESH)
    alone = [model.encode_tasks(text) for text in FRESH]
    for task in TASKS:
        vectors = np.stack([of_one[task] for of_one in alone])
        assert cosines(together[task], vectors).min() > 0.999999


def test_options_do_what_they_do_in_encode(mapped: Path) -> None:
    model = Embedder(mapped, precision="fp32")
    whole = model.encode_tasks(FRESH)
    cut = model.encode_tasks(FRESH, tasks=["third"], truncate_dim=16)
    assert list(cut) == ["third"]
    expected = whole["third"][:, :16]
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(cut["third"] - expected).max() < 1e-6
    half = model.encode_tasks(FRESH, output_format="float16")["second"]
    assert half.dtype == np.float16
    ranges = np.array([[-1.0] * 96, [1.0] * 96], np.float32)
    codes = model.encode_tasks(FRESH, output_format="int8", ranges=ranges)["second"]
    assert codes.dtype == np.int8
    assert np.abs((codes + 128.0) / 255 * 2 - 1 - whole["second"]).max() < 0.01
    empty = model.encode_tasks([])
    assert {task: rows.shape for task, rows in empty.items()} == dict.fromkeys(TASKS, (0, 96))
    twice = model.encode_tasks([FRESH[0], FRESH[1], FRESH[0]])["second"]
    assert (twice[0] == twice[2]).all()
    assert model.encode_tasks(FRESH[0])["second"].shape == (96,)


def test_mapped_vectors_are_of_a_kind_of_their_own(mapped: Path) -> None:
    model = Embedder(mapped, precision="fp32")
    kinds = {model.fingerprint(task=task, mapped=on) for task in TASKS for on in (True, False)}
    assert len(kinds) == 6
    assert model.fingerprint_parts(task="third", mapped=True)["output"] == "embeddings[2]"


def test_what_cannot_be_given_is_refused_by_name(plain: Path, mapped: Path) -> None:
    with pytest.raises(EmbedgeValueError, match="fit-maps BUNDLE --texts FILE --precision fp32"):
        Embedder(plain, precision="fp32").encode_tasks(FRESH)
    model = Embedder(mapped, precision="fp32")
    with pytest.raises(EmbedgeValueError, match="no task 'fourth'; they give"):
        model.encode_tasks(FRESH, tasks=["second", "fourth"])
    with pytest.raises(EmbedgeValueError, match="a list of some of"):
        model.encode_tasks(FRESH, tasks="second")
    model = Embedder(mapped, precision="fp32", task="second", prompts={"query": "w1 "})
    with pytest.raises(EmbedgeValueError, match="has no prompt 'passage'"):
        model.encode_tasks(FRESH, prompt_name="passage")


def test_what_cannot_be_fitted_is_refused_by_name(plain: Path, mapped: Path) -> None:
    for options, message in (
        ({"base": "fourth"}, "no task 'fourth'"),
        ({"tasks": ["mix"]}, "none but the base"),
        ({"precisions": ["int4"]}, "no precision 'int4'"),
        ({"layers": 2}, "at most 1"),
        ({"hidden": -1}, "hidden: expected a whole number"),
    ):
        with pytest.raises(EmbedgeValueError, match=message):
            fit(plain, **options)
    with pytest.raises(EmbedgeValueError, match="at least 40"):
        fit(plain, TEXTS[:39])
    with pytest.raises(EmbedgeValueError, match="has maps already"):
        fit(mapped)
    with pytest.warns(EmbedgeWarning, match="maps of 240 texts"), pytest.raises(EmbedgeValueError):
        fit_maps(plain, TEXTS, base="fourth")


def test_a_graph_that_does_not_name_its_states_is_refused(plain: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(plain, tmp_path / "old")
    file = copy / "fp32/mix.onnx"
    model = onnx.load(str(file), load_external_data=False)
    kept = [entry for entry in model.metadata_props if entry.key != "embedge.states"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    file.write_bytes(model.SerializeToString())
    with pytest.raises(EmbedgeValueError, match="export it again"):
        fit(copy, precisions=["fp32"])


def test_fitting_again_leaves_no_file_of_before(copy: Path) -> None:
    before = manifest(copy)["precisions"]["fp32"]["maps"]
    fit(copy, precisions=["fp32"], tasks=["third"], overwrite=True)
    after = manifest(copy)["precisions"]["fp32"]["maps"]
    assert after["tasks"] == ["mix", "third"]
    assert after["graph"] != before["graph"]
    assert not (copy / before["graph"]).exists()
    assert not Bundle(copy, verify="full").problems(hashes=True)
    assert list(Embedder(copy, precision="int8").encode_tasks(FRESH)) == list(TASKS)


def test_a_subset_keeps_maps_where_it_has_their_tasks(copy: Path, tmp_path: Path) -> None:
    whole = subset_bundle(copy, tmp_path / "whole", precisions=["fp32"])
    assert list(Embedder(whole).encode_tasks(FRESH)) == list(TASKS)
    part = subset_bundle(copy, tmp_path / "part", tasks=["mix", "second"])
    assert Embedder(part, precision="fp32").maps is None
    assert not list(part.rglob("maps*"))


@pytest.mark.slow
def test_a_task_that_is_added_leaves_maps_as_they_are(
    copy: Path, model: Path, loras: dict[str, Path]
) -> None:
    before = Embedder(copy, precision="fp32").encode_tasks(FRESH)
    export_bundle(
        model,
        adapters={"fourth": loras["second"]},
        precisions=["fp32"],
        calibration="none",
        out=copy,
    )
    after = Embedder(copy, precision="fp32").encode_tasks(FRESH)
    assert all((before[task] == after[task]).all() for task in TASKS)


@pytest.mark.slow
def test_tasks_that_share_a_graph_get_maps(
    model: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    bundle = export_bundle(
        model,
        adapters=loras,
        precisions=["int8"],
        calibration="none",
        layout="shared",
        out=tmp_path / "shared",
    )
    fit(bundle)
    embedder = Embedder(bundle)
    found = embedder.encode_tasks(FRESH)
    assert cosines(found["mix"], embedder.encode(FRESH, task="mix")).min() > 0.999999
    own, base = (embedder.encode(FRESH, task=task) for task in ("second", "mix"))
    assert 1 - cosines(found["second"], own).mean() < 0.5 * (1 - cosines(base, own).mean())


def test_the_command(
    plain: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[fit_maps.__module__], "_FEW_TEXTS", 1)
    bundle = shutil.copytree(plain, tmp_path / "bundle")
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, texts in zip(files, (TEXTS[:120], TEXTS[120:]), strict=True):
        file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
    arguments = ["fit-maps", str(bundle), "--texts", *map(str, files), "--field", "text"]
    arguments += ["--precision", "fp32", "--layers", "1", "--quiet"]
    assert main([*arguments, "--base", "mix"]) == 0
    shown = capsys.readouterr().out
    assert "mix, the base" in shown
    assert "third" in shown
    assert main(["inspect", str(bundle)]) == 0
    assert "one pass for several tasks" in capsys.readouterr().out
    assert main([*arguments, "--base", "fourth"]) == 2
    assert "fourth" in error_line(capsys).split("has no task")[1]
