"""Small exports for tests, and what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from embedge.export import export_bundle

PRECISIONS = ["fp32", "fp16", "int8", "int4"]
# Weights above 4096 bytes at every precision, so that they lie in files.
WIDE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 192, "gain": 0.6}


def small(source: Path, out: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {
        "adapters": {"task": None},
        "precisions": ["int8"],
        "calibration": "none",
    }
    return export_bundle(source, out=out, **{**settings, **options})


def contents(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def manifest(bundle: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((bundle / "manifest.json").read_text("utf-8"))
    return document


def external(bundle: Path, graph: str) -> dict[str, tuple[str, int, int]]:
    """File, offset and length of every tensor outside a graph."""
    model = onnx.load(bundle / graph, load_external_data=False)
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entry = {e.key: e.value for e in tensor.external_data}
            found[tensor.name] = (entry["location"], int(entry["offset"]), int(entry["length"]))
    return found


def endings(precision: str) -> list[str]:
    """Of the files that a task has at a precision."""
    unpacked = ["unpacked.onnx", "unpack.json"] if precision == "int4" else []
    return ["onnx", "bin", "layers.json", *unpacked]


def leftovers(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir() if out.name in p.name)


def child(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
