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
from collections.abc import Sequence
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

QEMU = shutil.which("qemu-x86_64")

needs_qemu = pytest.mark.skipif(
    QEMU is None or sys.platform != "linux" or os.uname().machine != "x86_64",
    reason="needs an x86-64 Linux with qemu-x86_64 (Debian: apt install qemu-user)",
)


SCRIPT = """
import json, sys
import numpy as np
import embedge.runtime.sessions.session as sessions
from embedge.runtime import Embedder, InferenceError

texts = [f"w{i}" for i in range(30)]
vectors = {}
exact = sessions.keep_matmuls_exact
for name, ask in (("asked", exact), ("not asked", lambda options: None)):
    sessions.keep_matmuls_exact = ask
    model = Embedder(sys.argv[1], verify="none", threads=1)
    vectors[name] = model.encode(texts, batch_size=30).tolist()
    vectors[name + " alone"] = [model.encode(text).tolist() for text in texts]
from embedge.runtime.host.saturation import describe_processor, saturates_u8s8

answer = {"saturates": saturates_u8s8(), "line": describe_processor()}
print(json.dumps({**answer, "vectors": vectors}))
"""


def run_python(
    package_path: Path, code: str, *arguments: str, launcher: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, as Haswell below an emulator."""
    variables = dict(os.environ)
    if launcher:  # an emulator answers CPUID itself, see tests/processors
        variables.pop("LD_PRELOAD", None)
    return subprocess.run(
        [*launcher, os.path.realpath(sys.executable), "-c", code, *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **variables,
            "QEMU_CPU": "Haswell",
            # The venv's packages: below an emulator sys.executable is resolved.
            "PYTHONPATH": os.pathsep.join([str(package_path), *filter(None, sys.path)]),
        },
    )


def errors(
    package_path: Path, bundle: Path, exact: Any, *launcher: str
) -> tuple[bool, str, dict[str, float]]:
    """The probe's answer, the line about it, and the relative error of the vectors by how sessions ask."""
    answer = json.loads(run_python(package_path, SCRIPT, str(bundle), launcher=launcher).stdout)
    expected = exact[4:34]  # "w0" is id 4
    return (
        answer["saturates"],
        answer["line"],
        {
            name: float(np.linalg.norm(np.array(rows) - expected) / np.linalg.norm(expected))
            for name, rows in answer["vectors"].items()
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
    if saturates:  # then there are no kernels of embedge's, which take VNNI
        monkeypatch.setattr(saturation, "saturates_u8s8", lambda: True)
        monkeypatch.setattr("embedge.runtime.sessions.session.own_kernels", lambda: False)
    vectors = Embedder(path, verify="none").encode([f"w{i}" for i in range(30)])
    assert np.linalg.norm(vectors - exact[4:34]) < 0.004 * np.linalg.norm(exact[4:34])


@pytest.mark.slow
@needs_qemu
def test_an_emulated_processor_without_vnni_gives_exact_matmuls(
    int8_bundle: tuple[Path, Any], package_path: Path
) -> None:
    path, exact = int8_bundle
    saturates, line, emulated = errors(package_path, path, exact, str(QEMU))
    assert saturates
    assert line.endswith("u8×s8 matmuls saturate, so u8×u8 ones are used: exact, slower")
    for how in ("", " alone"):
        assert emulated["asked" + how] < 0.004  # 8-bit steps, see above
        assert emulated["not asked" + how] > 10 * 0.008
    if not saturates_u8s8():
        _, line, native = errors(package_path, path, exact)
        assert line.endswith("8-bit matmuls are exact")
        assert native["asked"] == native["not asked"]
        assert emulated["asked"] == pytest.approx(native["asked"], rel=0.01)


@pytest.mark.slow
@needs_qemu
def test_an_emulated_processor_without_avx512_does_without_the_kernel(package_path: Path) -> None:
    code = """
from embedge.runtime.kernels import library
library.has_amx = lambda: False  # the machine's, in /proc
print(library.own_kernels())
"""
    done = run_python(package_path, code, launcher=[str(QEMU)])
    assert done.stdout.strip() == "False"
    assert "EmbedgeWarning" not in done.stderr


EXPORTED = """
import json, sys
from embedge.runtime import Embedder, InferenceError

vectors = {}
for bundle, precision in [pair.split("=") for pair in sys.argv[1:]]:
    model = Embedder(bundle, precision=precision, verify="none", threads=1)
    texts = ["ab", "a", "hello world, how are you?", "x" * 50, "0123456789 !"]
    vectors[bundle + precision] = model.encode(texts).tolist()
    vectors[bundle + precision + "alone"] = [model.encode(t).tolist() for t in texts]
print(json.dumps(vectors))
"""


@pytest.mark.slow
@needs_qemu
def test_exported_models_give_the_same_vectors_on_an_emulated_haswell(
    tmp_path: Path, package_path: Path
) -> None:
    """An encoder and a decoder at int8, int4 and int4 unpacked, from the exporter's own tests."""
    from embedge.export import export_bundle
    from tests.helpers.models import make_model, save

    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "gain": 0.6}
    pairs = []
    for name, pooling in (("bert", "mean"), ("qwen2", "lasttoken")):
        source = save(make_model(name, **wide), tmp_path / name, pooling=pooling)
        out = export_bundle(
            source,
            adapters={"task": None},
            precisions=["int8", "int4"],
            out=tmp_path / f"{name}-bundle",
            calibration="none",
        )
        pairs += [f"{out}={precision}" for precision in ("int8", "int4", "int4-unpacked")]
    emulated, native = (
        json.loads(run_python(package_path, EXPORTED, *pairs, launcher=launcher).stdout)
        for launcher in ([str(QEMU)], [])
    )
    assert len(native) == 2 * len(pairs)
    for key, vectors in native.items():
        a, b = np.array(vectors), np.array(emulated[key])
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosines.min() > 1 - 1e-3, key
