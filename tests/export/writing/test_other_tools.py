"""What the guide says of other tools gives embedge's vectors, each with the tool itself, where it is installed.

onnxruntime-node is taken from the folder ``node_modules`` that EMBEDGE_NODE_MODULES names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedge.export import export_bundle, save_pretrained
from embedge.runtime import Embedder
from tests.helpers.documents import blocks
from tests.helpers.models import make_model, save
from tests.helpers.optimum import model_class

GUIDE = "docs/guides/without-embedge.md"
TEXTS = ["how do I sort a dict", "another text"]  # of the guide
NODE_MODULES = os.environ.get("EMBEDGE_NODE_MODULES", "")


@pytest.fixture(scope="module")
def place(few_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the guide's code runs: its source, its bundle, and the folder that it writes."""
    place = tmp_path_factory.mktemp("place")
    shape = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 384}
    save(make_model("bert", gain=0.8, **shape), place / "MODEL", max_length=48)
    export_bundle(
        place / "MODEL",
        adapters={"code": None},
        precisions=["int8"],
        calibration=few_texts,
        out=place / "portable",
        portable=True,
    )
    save_pretrained(place / "portable", place / "folder", task="code")
    return place


def run(text: str) -> dict[str, Any]:
    """The names that the guide's block of Python with a text gives."""
    (code,) = [b.body for b in blocks(GUIDE) if b.language == "python" and text in b.body]
    names: dict[str, Any] = {"np": np}
    exec(code, names)
    return names


def expected(place: Path) -> NDArray[np.float32]:
    """embedge's vectors, by ONNX Runtime's kernels or its own."""
    return Embedder(place / "portable", threads=1).encode(TEXTS, batch_size=len(TEXTS))


def check(vectors: Any, place: Path) -> None:
    wanted = expected(place)
    assert vectors.shape == wanted.shape
    cosines = (np.asarray(vectors, np.float64) * wanted).sum(axis=1)
    assert cosines.min() > 0.9995
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_sentence_transformers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_class()
    monkeypatch.chdir(place)
    check(run("backend=")["vectors"], place)


@pytest.mark.slow
def test_optimum(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_class()
    monkeypatch.chdir(place)
    check(run("ORTModelForFeatureExtraction")["vectors"], place)


@pytest.mark.slow
def test_fastembed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastembed")
    monkeypatch.chdir(place)
    check(run("fastembed")["vectors"], place)


@pytest.mark.slow
@pytest.mark.skipif(
    not NODE_MODULES or shutil.which("node") is None,
    reason="needs Node.js and EMBEDGE_NODE_MODULES, a folder with onnxruntime-node and @huggingface/transformers",
)
def test_the_cards_javascript(place: Path, tmp_path: Path) -> None:
    card = (place / "portable" / "README.md").read_text("utf-8")
    (code,) = re.findall("```js\n(.*?)```", card, re.DOTALL)
    code = code.replace('"path/to/this/folder"', json.dumps(str(place / "portable")))
    code = code.replace('await encode("a text")', f"await encode({json.dumps(TEXTS[0])})")
    (tmp_path / "node_modules").symlink_to(NODE_MODULES, target_is_directory=True)
    (tmp_path / "card.mjs").write_text(
        code + "\nconsole.log(JSON.stringify(Array.from(vector)));", "utf-8"
    )
    done = subprocess.run(
        ["node", "card.mjs"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    vector = np.array(json.loads(done.stdout.splitlines()[-1]))
    assert float(vector @ expected(place)[0]) > 0.9995
