from __future__ import annotations

import logging
import types
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from embedge.runtime import DeviceError, Embedder, EmbedgeValueError
from embedge.runtime.sessions import device as device_module
from embedge.runtime.sessions.device import choose_device, cuda_problem, split_device

HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def works(monkeypatch: pytest.MonkeyPatch, problem: str | None) -> None:
    monkeypatch.setattr(device_module, "cuda_problem", lambda index=0: problem)


@pytest.mark.parametrize(
    ("requested", "supported", "problem", "chosen"),
    [
        ("cpu", ["cpu", "cuda"], None, "cpu"),
        ("cuda", ["cpu", "cuda"], None, "cuda"),
        ("auto", ["cpu", "cuda"], None, "cuda"),
        ("auto", ["cpu", "cuda"], "no provider", "cpu"),
        ("auto", ["cpu"], None, "cpu"),
        ("auto", ["cuda"], None, "cuda"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch,
    requested: str,
    supported: list[str],
    problem: str | None,
    chosen: str,
) -> None:
    works(monkeypatch, problem)
    assert choose_device(requested, "int4", supported) == chosen


def test_a_precision_without_cuda_kernels_is_refused(bundle: Any) -> None:
    with pytest.raises(EmbedgeValueError, match="'fp32' does not run on cuda; it runs on cpu"):
        Embedder(bundle.path, device="cuda")


def test_a_precision_for_cuda_only_says_why_it_does_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    works(monkeypatch, "no provider")
    with pytest.raises(DeviceError, match="'fp16' runs on cuda only: no provider"):
        choose_device("auto", "fp16", ["cuda"])
    with pytest.raises(EmbedgeValueError, match="'fp16' does not run on cpu; it runs on cuda"):
        choose_device("cpu", "fp16", ["cuda"])


def test_an_unknown_device_is_refused_with_the_list() -> None:
    with pytest.raises(EmbedgeValueError, match="'gpu'; expected one of auto, cpu, cuda"):
        choose_device("gpu", "int8", ["cpu"])


def test_auto_says_what_it_took(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    works(monkeypatch, "no provider")
    with caplog.at_level(logging.INFO, "embedge.runtime"):
        choose_device("auto", "int4", ["cpu", "cuda"])
    assert caplog.messages == ["device auto: cpu for int4 (no provider)"]


@pytest.mark.skipif(HAS_CUDA, reason="ONNX Runtime has a CUDA provider here")
def test_a_missing_provider_comes_with_the_commands_that_mend_it(make_bundle: Any) -> None:
    tiny = make_bundle(precisions={"fp32": {"devices": ["cpu", "cuda"]}})
    assert Embedder(tiny.path).device == "cpu"
    with pytest.raises(DeviceError, match=r"pip uninstall -y onnxruntime` and .*onnxruntime-gpu"):
        Embedder(tiny.path, device="cuda")


def test_a_provider_that_does_not_load_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself falls back to the processor with a log line."""
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)

    class OnlyCpu:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", OnlyCpu)
    assert "does not load; check the driver" in str(cuda_problem())


def preload_dlls_like_onnxruntimes() -> None:
    print("Failed to load libcublas")


def test_the_library_that_the_provider_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    provider = tmp_path / "capi" / "libonnxruntime_providers_cuda.so"
    provider.parent.mkdir()
    provider.write_bytes(b"no library")
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))
    printing = types.FunctionType(preload_dlls_like_onnxruntimes.__code__, vars(onnxruntime))
    monkeypatch.setattr(onnxruntime, "preload_dlls", printing)

    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("no provider")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    found = str(cuda_problem())
    assert found.startswith(f"the CUDA provider is installed but does not load ({provider}: ")
    assert capsys.readouterr().out == ""
    assert "print" not in vars(onnxruntime)


@pytest.mark.skipif(
    not HAS_CUDA or cuda_problem() is not None, reason="no CUDA device that ONNX Runtime can use"
)
def test_cuda_gives_the_vectors_of_the_processor(make_bundle: Any) -> None:
    tiny = make_bundle(precisions={"fp32": {"devices": ["cpu", "cuda"]}})
    texts = ["w1", "w2 w3 w4", "w5"]
    on_cpu = Embedder(tiny.path, device="cpu").encode(texts)
    model = Embedder(tiny.path)
    assert model.device == "cuda"
    assert (on_cpu * model.encode(texts)).sum(axis=1).min() >= 0.999999


@pytest.mark.parametrize(
    ("device", "parts"),
    [("auto", ("auto", 0)), ("cpu", ("cpu", 0)), ("cuda", ("cuda", 0)), ("cuda:12", ("cuda", 12))],
)
def test_a_gpu_is_named_by_its_number(device: str, parts: tuple[str, int]) -> None:
    assert split_device(device) == parts


@pytest.mark.parametrize("device", ["cuda:", "cuda:-1", "cuda:x", "cpu:0", "auto:1", "", None, 0])
def test_other_devices_are_refused(device: Any) -> None:
    with pytest.raises(EmbedgeValueError, match="device is .* or cuda:N for a GPU's number"):
        split_device(device)


def test_the_number_reaches_the_probe_and_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(device_module, "cuda_problem", asked.append)
    assert choose_device("cuda:3", "fp16", ["cuda"]) == "cuda:3"
    assert asked == [3]
