"""Long texts through encoders: the same vectors as by transformers, in memory that grows with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.export import export_bundle
from embedge.export.graph.long_attention import FLASH_TOKENS
from embedge.runtime import Embedder
from tests.helpers.models import Reference, cosines, make_model, random_texts, save
from tests.helpers.sessions import open_graph, session_options

REACH = 20  # of the windows: a window is a text's first 40 tokens and more
MODELS: dict[str, dict[str, Any]] = {
    "modernbert": {"max_position_embeddings": 1400, "local_attention": 2 * REACH},
    "xlm-roberta": {"max_position_embeddings": 1402},
}
LENGTHS = (
    *(1, REACH, 8 * REACH - 1, 8 * REACH, 8 * REACH + 1, 9 * REACH, 9 * REACH + 1, 311),
    *(FLASH_TOKENS - 1, FLASH_TOKENS, FLASH_TOKENS + 1, 1200),
)


def texts_of(lengths: tuple[int, ...]) -> list[str]:
    """A text of each number of tokens, the two special ones included."""
    letters = "".join(random_texts(400)).replace(" ", "")
    starts = np.random.default_rng(0).integers(0, len(letters) - 1400, len(lengths))
    return [letters[s : s + max(0, n - 2)] for s, n in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Source and bundle of a model, whose int8 graph has float32 products and int8's attention."""
    root = tmp_path_factory.mktemp("long")
    made: dict[str, tuple[Path, Path]] = {}

    def export(name: str) -> tuple[Path, Path]:
        if name not in made:
            model = make_model(name, **MODELS[name])
            source = save(model, root / name, pooling="mean", max_length=1400)
            out = export_bundle(
                source,
                adapters={"task": None},
                precisions=["fp32", "int8"],
                out=root / f"{name}-bundle",
                keep={"*": "fp32"},
                calibration="none",
            )
            made[name] = source, out
        return made[name]

    return export


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_texts_of_any_length_match_transformers(name: str, precision: str, exported: Any) -> None:
    source, bundle = exported(name)
    texts = texts_of(LENGTHS)
    theirs = Reference(source).encode(texts)
    model = Embedder(bundle, precision=precision, threads=1)
    alone = np.concatenate([model.encode([text]) for text in texts])
    together = model.encode(texts, batch_size=len(texts), max_batch_tokens=100_000)
    # int8's table of words is rounded; attention's difference would be far larger
    lowest = 0.999999 if precision == "fp32" else 0.999
    assert cosines(alone, theirs).min() > lowest
    assert cosines(together, alone).min() > 0.999999


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("block_size", [None, 64])
def test_quantized_products_leave_vectors_independent_of_their_batch(
    name: str, block_size: int | None, tmp_path: Path
) -> None:
    """Rounding enlarges what two ways of attention differ by: a row must always go the same one."""
    wide = {**MODELS[name], "hidden_size": 64, "intermediate_size": 128}
    source = save(make_model(name, **wide), tmp_path / "source", pooling="mean", max_length=1400)
    out = export_bundle(
        source,
        adapters={"task": None},
        precisions=["int8" if block_size is None else "int4"],
        out=tmp_path / "out",
        calibration="none",
        int4_block_size=block_size or 32,
    )
    precision = "int8" if block_size is None else "int4"
    texts = texts_of((520, 520, 521, 521, 521, 525, 700, 701, 705, 1000, 1001, 511, 505, 300))
    model = Embedder(out, precision=precision, threads=1)
    alone = np.concatenate([model.encode([text]) for text in texts])
    for size in (2, 3, len(texts)):
        together = model.encode(texts, batch_size=size, max_batch_tokens=100_000)
        assert cosines(together, alone).min() > 0.999999


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_both_ways_of_attention_give_the_same(name: str, exported: Any) -> None:
    """A long row without padding, and the same row beside a longer one, in both places."""
    _, bundle = exported(name)
    session = open_graph(bundle / "int8" / "task.onnx")
    tokens = FLASH_TOKENS + 77
    ids = np.random.default_rng(1).integers(4, 90, (2, tokens + 130))
    mask = (np.arange(tokens + 130) < np.array([[tokens], [tokens + 130]])).astype(np.int64)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    feeds = {value.name: feeds[value.name] for value in session.get_inputs()}
    (alone,) = session.run(["embedding"], {n: feed[:1, :tokens] for n, feed in feeds.items()})
    (padded,) = session.run(["embedding"], feeds)
    assert cosines(alone, padded[:1]).min() > 0.9999999


def operators(bundle: Path, tokens: int, folder: Path) -> dict[str, int]:
    """How often each operator ran on a text alone."""
    options = session_options()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    file = bundle / "int8" / "task.onnx"
    session = open_graph(file, options)
    ids = np.full((1, tokens), 7)
    session.run(["embedding"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    counts: dict[str, int] = {}
    for event in json.loads(Path(session.end_profiling()).read_text("utf-8")):
        if event["name"].endswith("_kernel_time"):
            kind = event["args"]["op_name"]
            counts[kind] = counts.get(kind, 0) + 1
    return counts


@pytest.mark.slow
def test_what_runs_depends_on_the_length(exported: Any, tmp_path: Path) -> None:
    _, bundle = exported("modernbert")  # of four layers two look at everything
    short, middle, long = (operators(bundle, n, tmp_path) for n in (8 * REACH, 200, FLASH_TOKENS))
    assert (short["Attention"], short.get("Pad"), short.get("MultiHeadAttention")) == (
        4,
        None,
        None,
    )
    assert (middle["Attention"], middle["Pad"], middle.get("MultiHeadAttention")) == (4, 6, None)
    assert (long["Attention"], long["Pad"], long["MultiHeadAttention"]) == (2, 6, 2)


GROWTH = """
import sys
import numpy as np, onnxruntime
from embedge.runtime.host.memory import process_memory
from embedge.runtime.host.saturation import keep_matmuls_exact
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
keep_matmuls_exact(options)
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])

def run(tokens):
    ones = np.ones((1, tokens), np.int64)
    feeds = {"input_ids": 7 * ones, "attention_mask": ones, "token_type_ids": 0 * ones}
    session.run(["embedding"], {value.name: feeds[value.name] for value in session.get_inputs()})

def peak():
    return process_memory()["VmHWM"]

run(600)
before = peak()
run(6000)
print((peak() - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", MODELS)
def test_memory_grows_with_the_tokens(name: str, tmp_path: Path) -> None:
    """6,000 tokens; four heads' scores alone would be 576 MB, a window's mask 144 MB."""
    sizes = {**MODELS[name], "max_position_embeddings": 6100}
    model = make_model(name, **sizes)
    source = save(model, tmp_path / "source", pooling="mean", max_length=6090)
    out = export_bundle(
        source,
        adapters={"task": None},
        precisions=["int8"],
        out=tmp_path / "out",
        calibration="none",
    )
    command = [sys.executable, "-c", GROWTH, str(out / "int8" / "task.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60
