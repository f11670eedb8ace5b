"""What ``import embedge.runtime`` loads, costs and needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import embedge.runtime

BANNED = (
    "torch",
    "transformers",
    "onnx",
    "peft",
    "scipy",
    "optimum",
    "onnx_ir",
    "safetensors",
    "PIL",
    "orjson",
    "prometheus_client",
    "starlette",
    "uvicorn",
)

LOADED = """
import embedge.runtime, embedge.runtime.cli.main, embedge.runtime.cli.embed
import embedge.runtime.cli.inspect, embedge.runtime.cli.serve, json, sys
from embedge.runtime.host.saturation import saturates_u8s8
saturates_u8s8()
print(json.dumps(sorted(sys.modules)))
"""

FIRST = """
import numpy, sys
before = set(sys.modules)
import embedge.runtime, json
embedge.runtime.Embedder
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def child(script: str, *arguments: str) -> str:
    """What a script prints in a Python of its own with this one's import path."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    ).stdout


@pytest.mark.slow
def test_none_of_the_heavy_packages_and_no_other_part_of_embedge_is_loaded() -> None:
    loaded = json.loads(child(LOADED))
    assert "embedge.runtime" in loaded
    assert [name for name in loaded if name.split(".")[0] in BANNED] == []
    parts = {name.split(".")[1] for name in loaded if name.startswith("embedge.")}
    assert parts == {"runtime"}


@pytest.mark.slow
def test_the_import_alone_loads_numpy_and_the_standard_library() -> None:
    """ONNX Runtime, tokenizers and tqdm come with the first use, so the import is quick."""
    loaded = {name.split(".")[0] for name in json.loads(child(FIRST))}
    assert loaded - sys.stdlib_module_names == {"embedge", "numpy"}


# Slow to load, and of no use for embedding texts; or of other parts of the runtime.
NOT_FOR_TEXTS = {
    *(
        "concurrent.futures",
        "ctypes.util",
        "decimal",
        "email",
        "fractions",
        "importlib.metadata",
        "inspect",
    ),
    *("logging", "numpy.random", "random", "shutil", "socket", "subprocess", "tempfile", "zipfile"),
    *("embedge.runtime.bundle.model_card", "embedge.runtime.bundle.subset"),
    *("embedge.runtime.bundle.writing", "embedge.runtime.host.install_advice"),
    *("embedge.runtime.images.encode", "embedge.runtime.images.load"),
    *("embedge.runtime.images.patches", "embedge.runtime.tuning.prepack_graphs"),
}

VECTOR = """
import numpy, onnxruntime, sys, tokenizers
before = set(sys.modules)
from embedge import Embedder
import json
Embedder(sys.argv[1], precision="int8", verify="none").encode("w0 w1")
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.mark.slow
def test_a_first_vector_loads_what_it_takes_and_no_more(int8_bundle: tuple[Path, Any]) -> None:
    loaded = set(json.loads(child(VECTOR, str(int8_bundle[0]))))
    assert "embedge.runtime.sessions.session" in loaded
    assert loaded & NOT_FOR_TEXTS == set()


def test_what_is_exposed_is_what_is_listed() -> None:
    for name in embedge.runtime.__all__:
        getattr(embedge.runtime, name)
    with pytest.raises(AttributeError, match="has no attribute 'Embeder'"):
        _ = embedge.runtime.Embeder  # type: ignore[attr-defined]
    exposed = {
        name
        for name, value in vars(embedge.runtime).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("embedge.")
    }
    assert exposed == set(embedge.runtime.__all__) - {"__version__"}
    assert sorted(embedge.runtime.__all__) == sorted(set(embedge.runtime.__all__))
    assert embedge.runtime.__version__
