"""Integer matmuls that saturate: found by a probe, mended by a session option.

The processor without VNNI is emulated: ``QEMU_CPU=Haswell qemu-x86_64 python …`` (Debian's
qemu-user).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from embedge.runtime import Embedder, InferenceError
from embedge.runtime.host import saturation
from embedge.runtime.host.processor import instruction_sets
from embedge.runtime.host.saturation import probe_model, saturates_u8s8
from tests.helpers import saturated
from tests.helpers.int8_graph import write_int8_bundle
from tests.helpers.kernel import LIBRARY
from tests.runtime.conftest import bundles_in

ROOT = Path(__file__).resolve().parents[3]
QEMU = shutil.which("qemu-x86_64")

needs_qemu = pytest.mark.skipif(
    QEMU is None or sys.platform != "linux" or os.uname().machine != "x86_64",
    reason="needs an x86-64 Linux with qemu-x86_64 (Debian: apt install qemu-user)",
)


@dataclass
class Found:
    """What :mod:`tests.helpers.saturated` found, emulated and here, and the exact vectors of its bundle."""

    emulated: dict[str, Any]
    native: dict[str, Any]
    exact: Any
    messages: str

    def errors(self, where: str) -> dict[str, float]:
        """The relative error of the vectors by how sessions ask."""
        expected = self.exact[4:34]  # "w0" is id 4
        return {
            name: float(np.linalg.norm(np.array(rows) - expected) / np.linalg.norm(expected))
            for name, rows in getattr(self, where)["int8"].items()
        }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, package_path: Path) -> Found:
    """An encoder and a decoder at int8, int4 and int4 unpacked, and a bundle whose vectors are int8 products."""
    place = tmp_path_factory.mktemp("saturation")
    tiny = bundles_in(place)(precisions={"int8": {}}, special_tokens=False)
    exact = write_int8_bundle(tiny)
    bundles: dict[str, Any] = {"int8": str(tiny.path), "exported": exported(place)}
    done = emulated(package_path, bundles)
    return Found(json.loads(done.stdout), saturated.found(**bundles), exact, done.stderr)


def exported(place: Path) -> list[list[str]]:
    """Bundles and precisions, of the exporter's own tests; none where torch is not installed."""
    if find_spec("torch") is None:
        return []
    from embedge.export import export_bundle
    from tests.helpers.models import make_model, save

    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "gain": 0.6}
    pairs = []
    for name, pooling in (("bert", "mean"), ("qwen2", "lasttoken")):
        source = save(make_model(name, **wide), place / name, pooling=pooling)
        out = export_bundle(
            source,
            adapters={"task": None},
            precisions=["int8", "int4"],
            out=place / f"{name}-bundle",
            calibration="none",
        )
        pairs += [[str(out), precision] for precision in ("int8", "int4", "int4-unpacked")]
    return pairs


def emulated(package_path: Path, bundles: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Runs :mod:`tests.helpers.saturated` in a process of its own, as Haswell below an emulator."""
    variables = dict(os.environ)
    variables.pop("LD_PRELOAD", None)  # an emulator answers CPUID itself, see tests/processors
    command = [str(QEMU), os.path.realpath(sys.executable), "-m", "tests.helpers.saturated"]
    return subprocess.run(
        [*command, json.dumps(bundles)],
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
        env={
            **variables,
            "QEMU_CPU": "Haswell",
            # The venv's packages: below an emulator sys.executable is resolved.
            "PYTHONPATH": os.pathsep.join([str(package_path), str(ROOT), *filter(None, sys.path)]),
        },
    )


def test_the_probe_is_a_valid_model() -> None:
    model = onnx.load_from_string(probe_model())
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMulInteger"]


@pytest.mark.skipif(
    "CPUID_MASK" in os.environ or not instruction_sets() & {"avx512_vnni", "avx_vnni"},
    reason="this processor has no VNNI, does not tell, or tests/processors hides it",
)
def test_with_vnni_nothing_saturates() -> None:
    assert saturates_u8s8() is False


def test_the_probe_runs_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    saturates_u8s8()

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a second session was opened")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    saturates_u8s8()


def test_a_host_that_saturates_whatever_it_is_asked_is_refused_for_8_bits_alone(
    int8_bundle: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, two_tasks: Any
) -> None:
    asked: list[Any] = []

    def probe(configure: Any = None) -> bool:
        asked.append(configure)
        return True

    monkeypatch.setattr(saturation, "_known", [])
    monkeypatch.setattr(saturation, "_probe", probe)
    monkeypatch.setattr("embedge.runtime.sessions.session.own_kernels", lambda: False)
    saturation._saturates_when_asked.cache_clear()
    try:
        with pytest.raises(InferenceError, match="8-bit matmuls saturate .* take precision='fp32'"):
            Embedder(int8_bundle[0], verify="none").encode("w1")
        assert asked == [None, saturation.ask_for_exact_matmuls]
        plain = Embedder(two_tasks.path, precision="fp32", task="code")
        assert plain.encode("w1").shape == (8,)
    finally:
        saturation._saturates_when_asked.cache_clear()


@pytest.mark.parametrize("saturates", [False, True])
def test_vectors_have_the_error_of_8_bit_steps(
    int8_bundle: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, saturates: bool
) -> None:
    """Asked for exact matmuls or not, where they are exact; where they saturate, asked."""
    path, exact = int8_bundle
    if saturates:  # which sessions with embedge's kernels do not ask
        monkeypatch.setattr(saturation, "saturates_u8s8", lambda: True)
        monkeypatch.setattr("embedge.runtime.sessions.session.own_kernels", lambda: False)
    vectors = Embedder(path, verify="none").encode([f"w{i}" for i in range(30)])
    assert np.linalg.norm(vectors - exact[4:34]) < 0.004 * np.linalg.norm(exact[4:34])


@pytest.mark.slow
@needs_qemu
def test_an_emulated_processor_without_vnni_gives_exact_matmuls(found: Found) -> None:
    assert found.emulated["saturates"]
    expected = "u8×s8 matmuls of ONNX Runtime saturate, and are kept exact"
    assert found.emulated["line"].endswith(expected)
    emulated = found.errors("emulated")
    for how in ("", " alone"):
        assert emulated["asked" + how] < 0.004  # 8-bit steps, see above
        assert emulated["not asked" + how] > 10 * 0.008
    if not saturates_u8s8():
        assert found.native["line"].endswith("8-bit matmuls are exact")
        native = found.errors("native")
        assert native["asked"] == native["not asked"]
        assert emulated["asked"] == pytest.approx(native["asked"], rel=0.01)


@pytest.mark.slow
@needs_qemu
def test_an_emulated_processor_without_avx512_has_the_kernels_of_avx2(found: Found) -> None:
    assert found.emulated["kernels"] == ("avx2" if LIBRARY else None)
    assert "EmbedgeWarning" not in found.messages


@pytest.mark.slow
@needs_qemu
def test_exported_models_give_the_same_vectors_on_an_emulated_haswell(found: Found) -> None:
    """Of all texts together, and of each alone."""
    pytest.importorskip("torch")
    assert len(found.native["exported"]) == 6
    for key, pair in found.native["exported"].items():
        for native, emulated in zip(pair, found.emulated["exported"][key], strict=True):
            a, b = np.array(native), np.array(emulated)
            cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
            assert cosines.min() > 1 - 1e-3, key
