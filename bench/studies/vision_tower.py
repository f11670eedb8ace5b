"""The vision tower of a bundle beside torch and OpenVINO: ``python -m embedge.bench.studies.vision_tower``.

Times features of page-like pictures and compares them, a row for each image token, with torch in
float32. All systems get the same patches and run in one process, alternating in drawn order; what
depends on a picture's size (windows, angles) is made anew in each run by embedge and by torch, and is
part of the graph for OpenVINO, whose graph takes pictures of one size only.

Systems:

- ``embedge PRECISION``: the bundle's ``vision.onnx``;
- ``torch fp32`` and ``torch bf16``: transformers' module, which attends window by window, and
  ``torch bf16, batched windows``: the same weights with the windows of a picture as one batch;
- ``OpenVINO`` of the latter: ``fp`` as it comes (bfloat16 where a processor has it), ``int8`` with
  NNCF's 8-bit weights, ``int8-dq32`` and ``int8-dq128`` with 8-bit activations in groups besides.

Random weights give every feature the loud channels of the merger's bias, which flatter a cosine; so
cosines are shown a second time with the mean feature of the picture taken off both sides.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embedge.bench.errors import BenchArgumentError, BenchError
from embedge.bench.measure.latency import Times, alternate, ratio
from embedge.bench.peers.openvino import compile_for_cpu, compress_weights
from embedge.bench.studies.qwen_vision import FixedGridTower, load_tower, page
from embedge.bench.systems.qwen_vl import vision_features
from embedge.quant.fidelity import cosine_rows
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.images.layout import vision_inputs
from embedge.runtime.images.patches import ImagePatches, ImageProcessor

__all__ = ["SYSTEMS", "Agreement", "agreement", "main"]

Features = NDArray[np.float32]
Run = Callable[[], Features]
TORCH_FP32 = "torch fp32"
OPENVINO = {"fp": None, "int8": None, "int8-dq32": 32, "int8-dq128": 128}
SYSTEMS = (
    "embedge",
    TORCH_FP32,
    "torch bf16",
    "torch bf16, batched windows",
    *(f"OpenVINO {variant}" for variant in OPENVINO),
)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Cosines between two systems' features of one picture, over its image tokens.

    Attributes:
        mean: the mean.
        low: the 1st percentile.
        least: the least.
        centred_mean: the mean, with the reference's mean feature taken off both.
        centred_least: the least of these.
    """

    mean: float
    low: float
    least: float
    centred_mean: float
    centred_least: float


def agreement(ours: Features, reference: Features) -> Agreement:
    """Return how close features are, both float32 ``[tokens, width]``."""
    plain = cosine_rows(ours, reference)
    centre = reference.mean(0)
    centred = cosine_rows(ours - centre, reference - centre)
    return Agreement(
        mean=float(plain.mean()),
        low=float(np.percentile(plain, 1)),
        least=float(plain.min()),
        centred_mean=float(centred.mean()),
        centred_least=float(centred.min()),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="embedge.bench.studies.vision_tower", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path, help="the folder it was exported from")
    parser.add_argument("--precision", nargs="+", default=["int8"])
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["672x896", "224x224"],
        metavar="WIDTHxHEIGHT",
        help="pixels of the pictures (default: 672x896, which is 768 features, and 224x224)",
    )
    parser.add_argument("--without", nargs="*", default=[], metavar="SYSTEM", help="left out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.without if name not in SYSTEMS]
    if unknown:
        raise BenchArgumentError(
            f"--without {' '.join(unknown)}: known are {', '.join(map(repr, SYSTEMS))}"
        )
    sizes = [_size(name) for name in options.sizes]
    torch.set_num_threads(options.threads)
    tower = load_tower(options.checkpoint)
    for width, height in sizes:
        _compare(options, tower, width, height)
        gc.collect()  # before the next picture's graphs are made
    return 0


def _size(name: str) -> tuple[int, int]:
    width, _, height = name.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise BenchArgumentError(f"--sizes {name}: expected WIDTHxHEIGHT, such as 672x896")
    return int(width), int(height)


def _compare(options: argparse.Namespace, tower: Any, width: int, height: int) -> None:
    """Run all systems on one picture and print a table."""
    bundle = Bundle(options.bundle)
    image = bundle.manifest.model.image
    if image is None:
        raise BenchError(f"{options.bundle}: expected a bundle with a vision tower, found none")
    patches = ImageProcessor(image)(page(width, height))
    runs: dict[str, Run] = {}
    for name, build in _builders(options, bundle, tower, patches):
        try:
            runs[name] = build()
        except ImportError as error:
            print(f"{name} is not compared with: {error}")
    features = {name: run() for name, run in runs.items()}
    reference = features[TORCH_FP32]
    closeness = {}
    for name, values in features.items():
        precision = name.removeprefix("embedge ")
        turned = name.startswith("embedge") and _is_rotated(bundle, precision)
        closeness[name] = agreement(values, _rotated(reference) if turned else reference)
    del features
    times = alternate(runs, options.rounds, warm_up=1, block_s=0)
    print(
        f"\n{width}x{height} pixels, {patches.patches} patches, {len(reference)} image tokens, "
        f"{len(tower.blocks)} blocks, full attention in {list(tower.fullatt_block_indexes)}, "
        f"{options.rounds} rounds, {options.threads} threads"
    )
    _show(times, closeness)


def _builders(
    options: argparse.Namespace, bundle: Bundle, tower: Any, patches: ImagePatches
) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Yield each system's name and a function that opens it."""
    if "embedge" not in options.without:
        for precision in options.precision:
            open_graph = partial(_embedge, bundle, precision, patches, options.threads)
            yield f"embedge {precision}", open_graph
    yield TORCH_FP32, partial(_torch, tower, patches)  # what the others are compared with
    halves = [name for name in SYSTEMS if "bf16" in name and name not in options.without]
    if halves:
        half = load_tower(options.checkpoint).to(torch.bfloat16)
        if "torch bf16" in halves:
            yield "torch bf16", partial(_torch, half, patches)
        if "torch bf16, batched windows" in halves:
            yield "torch bf16, batched windows", partial(_batched, half, patches)
    models = _OpenVinoModels(tower, patches)
    for variant in OPENVINO:
        if f"OpenVINO {variant}" not in options.without:
            yield f"OpenVINO {variant}", partial(_openvino, models, variant, options.threads)


def _embedge(bundle: Bundle, precision: str, patches: ImagePatches, threads: int) -> Run:
    from embedge.runtime.sessions.session import SessionConfig, open_graph

    image = bundle.manifest.model.image
    assert image is not None
    session = open_graph(bundle, precision, "vision", SessionConfig(threads=threads))

    def run() -> Features:
        features: Features = session.run("image_features", vision_inputs([patches], image))[0]
        return features

    return run


def _torch(tower: Any, patches: ImagePatches) -> Run:
    pixels = torch.from_numpy(patches.values).to(tower.dtype)
    grid = torch.tensor([[1, *patches.grid]])

    def run() -> Features:
        with torch.inference_mode():
            features: Features = vision_features(tower, pixels, grid).float().numpy()
        return features

    return run


def _batched(tower: Any, patches: ImagePatches) -> Run:
    pixels = torch.from_numpy(patches.values).to(tower.dtype)
    module = FixedGridTower(tower, patches.grid).eval()

    def run() -> Features:
        with torch.inference_mode():
            features: Features = module(pixels).float().numpy()
        return features

    return run


class _OpenVinoModels:
    """The tower for pictures of one size in OpenVINO's form, each made when it is first asked for."""

    def __init__(self, tower: Any, patches: ImagePatches) -> None:
        self._tower, self.patches = tower, patches

    @cached_property
    def fp(self) -> Any:
        """Converted from torch."""
        import openvino

        module = FixedGridTower(self._tower, self.patches.grid).eval()
        example = torch.from_numpy(self.patches.values)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer's
            return openvino.convert_model(module, example_input=example, input=[example.shape])

    @cached_property
    def int8(self) -> Any:
        """The same with NNCF's 8-bit weights, symmetric."""
        return compress_weights(self.fp.clone(), 8)


def _openvino(models: _OpenVinoModels, variant: str, threads: int) -> Run:
    """Return a variant compiled for the CPU."""
    import openvino

    model = models.fp if variant == "fp" else models.int8
    compiled = compile_for_cpu(openvino.Core(), model, threads, OPENVINO[variant])
    request = compiled.create_infer_request()
    pixels = models.patches.values

    def run() -> Features:
        features: Features = np.array(request.infer([pixels], share_inputs=True)[0])
        return features

    return run


def _is_rotated(bundle: Bundle, precision: str) -> bool:
    return bool(bundle.manifest.precisions[precision].options.get("rotation", False))


def _rotated(features: Features) -> Features:
    """Return features as a bundle with rotated streams has them; cosines do not change by it."""
    from embedge.quant.rotation import Rotation

    return Rotation(features.shape[1]).rows(features)


def _show(times: dict[str, Times], closeness: dict[str, Agreement]) -> None:
    """Print medians, how many times as fast as torch fp32, and the cosines."""
    width = max(map(len, times)) + 2
    print(
        f"{'system':{width}}{'ms':>9}{'times as fast':>15}{'cosine mean':>13}{'1 %':>9}{'min':>9}"
        f"{'centred mean':>14}{'min':>9}"
    )
    for name, values in times.items():
        close = closeness[name]
        print(
            f"{name:{width}}{np.median(values):9.1f}{ratio(times[TORCH_FP32], values):15.2f}"
            f"{close.mean:13.5f}{close.low:9.5f}{close.least:9.5f}"
            f"{close.centred_mean:14.5f}{close.centred_least:9.5f}"
        )


if __name__ == "__main__":
    sys.exit(main())
