"""int4 under a budget: which layers get 8 bits, and that the bytes hold."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from embedge.export import export_bundle
from embedge.export.calibration.sensitivity import (
    Candidate,
    _sample,
    candidates,
    check_budget,
    within_budget,
)
from embedge.export.calibration.tokens import token_batches
from embedge.export.families import family_of
from embedge.export.graph.values import LinearGroup
from embedge.export.options import ExportOptions
from embedge.export.reading import read_model
from embedge.export.schemes.int4 import Int4Scheme
from embedge.export.weights.rotated import RotatedWeights
from embedge.quant import int4 as int4_module
from embedge.runtime import Embedder
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.host.memory import parse_bytes
from tests.helpers.models import cosines, load_base, make_model, random_texts, save

pytestmark = pytest.mark.slow

TEXTS = random_texts(24)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(5000, 5000), ("2.0GB", 2 * 10**9), ("900 MB", 9 * 10**8), ("1.5GiB", 3 << 29), ("7kb", 7000)],
)
def test_sizes_are_read(text: Any, expected: int) -> None:
    assert parse_bytes("budget", text) == expected


@pytest.mark.parametrize("text", ["", "GB", "2 tons", "-1", "1e9", True, "nan"])
def test_other_sizes_are_refused(text: Any) -> None:
    with pytest.raises(EmbedgeValueError, match="expected a number of bytes"):
        parse_bytes("budget", text)


FOUND = [
    Candidate(labels=("a",), gain=1.0, extra_bytes=100),
    Candidate(labels=("b", "c"), gain=3.0, extra_bytes=200),
    Candidate(labels=("d",), gain=0.1, extra_bytes=10),
]


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (1000, []),
        (1010, ["d"]),
        (1100, ["a"]),
        (1200, ["b", "c"]),
        (1299, ["b", "c", "d"]),
        (1310, ["b", "c", "a", "d"]),
    ],
)
def test_the_largest_gains_per_byte_that_fit_are_chosen(budget: int, chosen: list[str]) -> None:
    assert within_budget(FOUND, 1000, budget) == chosen


def test_a_budget_below_four_bits_names_what_is_needed() -> None:
    with pytest.raises(EmbedgeValueError, match="budget 999 bytes: a task at int4 takes 1,000"):
        check_budget(1000, 999, branches=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget") / "model"
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "gain": 0.6}
    save(make_model("qwen2", **shape, num_hidden_layers=3), folder, pooling="mean")
    return folder


def error(bundle: Path, precision: str, exact: Any) -> float:
    found = Embedder(bundle, precision=precision, threads=1).encode(TEXTS)
    return float(1 - cosines(exact, found).mean())


def request(source: Path, folder: Path) -> ExportOptions:
    return ExportOptions(
        source=str(source), adapters={"task": None}, precisions=("int4",), out=folder / "b"
    )


@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen2"])
def test_a_gain_is_what_the_vectors_lose_when_one_input_has_4_bits(
    name: str, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    save(make_model(name, hidden_size=48, intermediate_size=64, gain=0.6), source, pooling="mean")
    model = read_model(request(source, tmp_path))
    draw = np.random.default_rng(5)
    ids = [draw.integers(5, 60, size).tolist() for size in (3, 9, 17, 30)]
    batches = token_batches(ids, 0, 48)
    found = candidates(
        model,
        model.base,
        batches,
        int4=Int4Scheme(16, "rtn", 4),
        keep={"*layer*.1.*": "fp32"},
        scratch=tmp_path,
        report=lambda line: None,
    )
    assert len(found) == 4 * (len(model.architecture.layers) - 1)  # the second is decided
    assert not any(".1." in label for candidate in found for label in candidate.labels)

    def vectors(changed: Collection[str] = ()) -> NDArray[Any]:
        """By torch, each text alone, with the Linears of these labels rounded to 4 bits."""
        network = load_base(source)
        tensors = dict(network.named_parameters())
        for label in changed:
            lin, _, rows = label.partition("[")
            weight = tensors[f"{lin}.weight"].data
            part = slice(*map(int, rows[:-1].split(":"))) if rows else slice(None)
            blocks = int4_module.split_blocks(weight[part].numpy(), 16)
            scales, zeros = int4_module.block_grid(blocks)
            values = int4_module.dequantize(
                int4_module.quantize(blocks, scales, zeros), scales, zeros
            )
            rounded = torch.from_numpy(values.reshape(weight[part].shape))
            if name == "bert" and lin.endswith("attention.output.dense"):
                # values' bias passes attention as it is and is multiplied by the exact weight
                value = tensors[lin.replace("output.dense", "self.value.bias")].data
                tensors[f"{lin}.bias"].data += (weight - rounded) @ value
            weight[part] = rounded
        with torch.no_grad():
            states = [network(torch.tensor([text])).last_hidden_state for text in ids]
        return np.stack([state[0].mean(dim=0).numpy() for state in states])

    exact = vectors()
    for candidate in found:
        lost = 1 - cosines(exact, vectors(candidate.labels)).mean()
        assert candidate.gain == pytest.approx(lost, rel=0.01), candidate.labels


@pytest.mark.parametrize(
    ("width", "layers", "count", "longest"),
    [(384, 6, 32, 64), (2048, 36, 16, 14), (8192, 80, 12, 2)],
)
def test_a_sample_has_texts_of_all_lengths_and_fits(
    width: int, layers: int, count: int, longest: int
) -> None:
    config = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "intermediate_size": width,
        "max_position_embeddings": 512,
    }
    model = family_of({"model_type": "bert"}, "bert")(config, 256).architecture
    texts = [[5] * (size - 1) + [6] for size in range(1, 101)]
    sample = _sample(model, token_batches(texts, 0, 8))
    lengths = np.concatenate([batch.mask.sum(axis=1) for batch in sample])
    assert lengths.min() == 1 and lengths.max() == longest
    assert len(lengths) == count
    assert sum(batch.ids.size for batch in sample) * 4 * width * 4 * layers <= 256 << 20
    for batch in sample:
        ends = batch.ids[np.arange(len(batch.ids)), batch.mask.sum(axis=1) - 1]
        assert (ends == 6).all()  # what a model pools at the end is there


def test_a_sample_of_one_text_is_that_text() -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 64, "max_position_embeddings": 512}
    model = family_of({"model_type": "bert"}, "bert")(config, 256).architecture
    [batch] = _sample(model, token_batches([[7, 8]], 0, 64))
    np.testing.assert_array_equal(batch.ids, [[7, 8]])


def test_calibration_texts_without_tokens_cannot_choose(source: Path, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("", "utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n', "utf-8")
    tokenizer = json.loads((source / "tokenizer.json").read_text("utf-8"))
    tokenizer["post_processor"] = None
    shutil.copytree(source, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(EmbedgeValueError, match="none of those given has a token"):
        export_bundle(
            tmp_path / "model",
            adapters={"task": None},
            precisions=["int4"],
            budget="1GB",
            calibration=tmp_path / "c.jsonl",
            out=tmp_path / "b",
        )
    assert not (tmp_path / "b").exists()


def test_a_budget_is_not_spent_on_kept_layers(
    source: Path, few_texts: Path, tmp_path: Path
) -> None:
    export_bundle(
        source,
        adapters={"task": None},
        precisions=["int4"],
        keep={"layers.0.*": "fp32", "layers.1.*": "int8"},
        budget="1GB",
        calibration=few_texts,
        out=tmp_path / "b",
    )
    bundle = Bundle(tmp_path / "b")
    chosen = bundle.manifest.precisions["int4"].options["int8"]
    assert len(chosen) == 7 and all(label.startswith("layers.2.") for label in chosen)


def test_gains_of_a_rotated_model_are_those_of_its_vectors(source: Path, tmp_path: Path) -> None:
    """The states turned back: with a loss of nothing, the gains are nothing."""

    class Exact(Int4Scheme):
        def restored(self, group: LinearGroup, weight: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.ascontiguousarray(weight.T)

    model = read_model(request(source, tmp_path))
    base = model.weights(model.base, Int4Scheme(32, "rtn", 4))
    assert isinstance(base, RotatedWeights)
    batches = token_batches([[5, 6, 7], [8, 9, 10, 11, 12]], 0, 64)
    options: dict[str, Any] = {"keep": {}, "scratch": tmp_path, "report": lambda layer: None}
    nothing = candidates(model, base, batches, int4=Exact(32, "rtn", 4), **options)
    assert max(abs(candidate.gain) for candidate in nothing) < 1e-9
    found = candidates(model, base, batches, int4=Int4Scheme(32, "rtn", 4), **options)
    assert min(candidate.gain for candidate in found) > 1e-6


def test_a_budget_buys_closeness_within_its_bytes(source: Path, tmp_path: Path) -> None:
    adapters = {"task": None}
    plain = export_bundle(
        source, adapters=adapters, precisions=["fp32", "int8", "int4"], out=tmp_path / "plain"
    )
    exact = Embedder(plain, precision="fp32", threads=1).encode(TEXTS)
    sizes = {p: Bundle(plain).graph_bytes(p, "task") for p in ("int8", "int4")}
    budget = sizes["int4"] + (sizes["int8"] - sizes["int4"]) // 4
    mixed = export_bundle(
        source, adapters=adapters, precisions=["int4"], budget=budget, out=tmp_path / "mixed"
    )
    options = Bundle(mixed).manifest.precisions["int4"].options
    chosen = options["int8"]
    assert 0 < len(chosen) < 21  # of three layers' seven
    assert options["budget"] == budget
    data = sum(path.stat().st_size for path in (mixed / "int4").glob("*.bin"))
    assert data <= budget * 1.1  # files are padded to pages
    assert error(mixed, "int4", exact) < 0.8 * error(plain, "int4", exact)


def test_a_whole_budget_gives_eight_bits_to_every_layer(
    source: Path, few_texts: Path, tmp_path: Path
) -> None:
    out = export_bundle(
        source,
        adapters={"task": None},
        precisions=["int4"],
        budget="1GB",
        calibration=few_texts,
        out=tmp_path / "b",
    )
    assert len(Bundle(out).manifest.precisions["int4"].options["int8"]) == 21


@pytest.mark.parametrize(
    "options", [{"precisions": ["int8"]}, {"precisions": ["int4"], "calibration": "none"}]
)
def test_a_budget_without_a_choice_is_refused(
    options: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    with pytest.raises(EmbedgeValueError, match="it chooses between 4 and 8 bits by calibration"):
        export_bundle(source, adapters={"task": None}, out=tmp_path / "b", budget="1GB", **options)
    assert not (tmp_path / "b").exists()


def test_the_choice_is_the_same_for_a_task_that_is_added(
    source: Path, few_texts: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"precisions": ["int4"], "calibration": few_texts}
    settings |= {"budget": 120_000, "out": tmp_path / "b"}
    export_bundle(source, adapters={"one": None}, **settings)
    export_bundle(source, adapters={"one": None, "two": None}, **settings)
    model = Embedder(tmp_path / "b", threads=1)
    first, second = (model.encode(TEXTS, task=task) for task in ("one", "two"))
    np.testing.assert_array_equal(first, second)


def tensor_bytes(graph: Path) -> int:
    tensors = onnx.load(graph).graph.initializer
    return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in tensors)


def test_a_budget_counts_branches_which_both_kinds_of_layer_have(
    source: Path, tmp_path: Path
) -> None:
    adapters: dict[str, Path | None] = {"task": None}
    plain = export_bundle(source, adapters=adapters, precisions=["fp32"], out=tmp_path / "plain")
    exact = Embedder(plain, precision="fp32", threads=1).encode(TEXTS)
    options: dict[str, Any] = {"adapters": adapters, "precisions": ["int4"], "branch_rank": 16}
    four = export_bundle(source, out=tmp_path / "four", **options)
    smallest = tensor_bytes(four / "int4/task.onnx")
    with pytest.raises(EmbedgeValueError, match=r"int4 with branches takes .*a lower branch_rank"):
        export_bundle(source, budget=smallest // 2, out=tmp_path / "none", **options)
    budget = smallest * 11 // 10
    both = export_bundle(source, budget=budget, out=tmp_path / "both", **options)
    stated = Bundle(both).manifest.precisions["int4"].options
    assert 0 < len(stated["int8"]) < 21  # of three layers' seven
    assert stated["branch_rank"] == 16
    kinds = Counter(node.op_type for node in onnx.load(both / "int4/task.onnx").graph.node)
    assert kinds["MatMulNBitsBranch"] == 21 - len(stated["int8"])
    at_8 = sum(n for kind, n in kinds.items() if kind.startswith("MatMulIntegerToFloatBranch"))
    assert at_8 == len(stated["int8"])
    assert smallest < tensor_bytes(both / "int4/task.onnx") <= budget
    assert error(both, "int4", exact) < 0.9 * error(four, "int4", exact)
