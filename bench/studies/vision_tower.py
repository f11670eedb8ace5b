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
import contextlib
import gc
import io
import json
import logging
import re
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
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.images.layout import vision_inputs
from embedge.runtime.images.patches import ImagePatches, ImageProcessor

__all__ = ["SYSTEMS", "Agreement", "FixedGridTower", "agreement", "load_tower", "main"]

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
_TOWER = re.compile(r"^(?:model\.)?visual\.")


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
    plain = _cosines(ours, reference)
    centre = reference.mean(0)
    centred = _cosines(ours - centre, reference - centre)
    return Agreement(
        mean=float(plain.mean()),
        low=float(np.percentile(plain, 1)),
        least=float(plain.min()),
        centred_mean=float(centred.mean()),
        centred_least=float(centred.min()),
    )


class FixedGridTower(torch.nn.Module):
    """Transformers' vision tower for pictures of one size, without control flow that depends on it.

    The same modules and weights; windows, angles and the order of patches are constants, and the
    windows of a picture are one batch of the attention, the smaller ones padded and masked.

    Args:
        tower: ``Qwen2_5_VisionTransformerPretrainedModel``.
        grid: rows and columns of patches.
    """

    order: torch.Tensor
    restore: torch.Tensor
    index: torch.Tensor
    places: torch.Tensor
    mask: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, tower: Any, grid: tuple[int, int]) -> None:
        super().__init__()
        self.tower = tower
        size = torch.tensor([[1, *grid]])
        group = tower.spatial_merge_unit
        order, bounds = tower.get_window_index(size)
        angles = tower.rot_pos_emb(size).reshape(-1, group, tower.blocks[0].attn.head_dim // 2)
        angles = angles[order].reshape(grid[0] * grid[1], -1)
        lengths = torch.tensor(bounds).diff()
        lengths = lengths[lengths > 0]  # transformers repeats a bound where a window is empty
        width = int(lengths.max())
        real = torch.arange(width) < lengths[:, None]
        index = torch.zeros(len(lengths), width, dtype=torch.int64)
        index[real] = torch.arange(len(angles))
        mask = torch.where(real, 0.0, -torch.inf)[:, None, None].to(tower.dtype)
        self.even = bool(real.all())
        self.shape = (len(lengths), width)
        self.register_buffer("order", order)
        self.register_buffer("restore", order.argsort())
        self.register_buffer("index", index.reshape(-1))
        self.register_buffer("places", real.reshape(-1).nonzero()[:, 0])
        self.register_buffer("mask", mask)
        for name, values in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, torch.cat([values, values], -1)[:, None])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return ``[features, width]`` of patches ``[patches, values]``."""
        tower = self.tower
        count, group = len(self.cos), tower.spatial_merge_unit
        hidden = tower.patch_embed(pixels)
        hidden = hidden.reshape(count // group, group, -1)[self.order].reshape(count, -1)
        for number, block in enumerate(tower.blocks):
            whole = number in tower.fullatt_block_indexes
            hidden = hidden + self._attention(block.attn, block.norm1(hidden), whole)
            hidden = hidden + block.mlp(block.norm2(hidden))
        features: torch.Tensor = tower.merger(hidden)[self.restore]
        return features

    def _attention(self, attention: Any, states: torch.Tensor, whole: bool) -> torch.Tensor:
        count, heads = len(self.cos), attention.num_heads
        q, k, v = attention.qkv(states).reshape(count, 3, heads, -1).unbind(1)
        q, k = self._turned(q), self._turned(k)
        shape, mask = ((1, count) if whole else self.shape), None
        if not whole and not self.even:
            q, k, v = (part[self.index] for part in (q, k, v))
            mask = self.mask
        q, k, v = (part.reshape(*shape, heads, -1).transpose(1, 2) for part in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(shape[0] * shape[1], -1)
        projected: torch.Tensor = attention.proj(mixed if mask is None else mixed[self.places])
        return projected

    def _turned(self, states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        first, second = wide.chunk(2, -1)
        turned = wide * self.cos + torch.cat([-second, first], -1) * self.sin
        return turned.to(states.dtype)


def load_tower(checkpoint: Path) -> Any:
    """Return the vision tower of a checkpoint as transformers' module, in float32.

    Args:
        checkpoint: a local folder with ``config.json`` and safetensors files, of jina-embeddings-v4
            or Qwen2.5-VL; only the tower's tensors are read.

    Raises:
        BenchError: the tower's tensors are not all there.
    """
    from safetensors import safe_open
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    settings = json.loads((checkpoint / "config.json").read_text("utf-8"))
    make: Any = Qwen2_5_VLVisionConfig  # untyped
    config = make(**settings["vision_config"])
    build: Any = modeling.Qwen2_5_VisionTransformerPretrainedModel
    tower = build._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    missing = dict(tower.named_parameters())
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for stored in tensors.keys():
                if _TOWER.match(stored):
                    name = _TOWER.sub("", stored)
                    missing.pop(name).data.copy_(tensors.get_tensor(stored))
    if missing:
        raise BenchError(
            f"{checkpoint}: expected all tensors of a vision tower, found none for "
            f"{', '.join(sorted(missing)[:5])}"
        )
    return tower.eval()


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
    patches = ImageProcessor(image)(_page(width, height))
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


def _page(width: int, height: int) -> Any:
    """Noise, about as smooth as a page."""
    from PIL import Image

    small = (max(1, height // 8), max(1, width // 8), 3)
    picture = np.random.default_rng(0).integers(0, 256, small, np.uint8)
    return Image.fromarray(picture).resize((width, height))


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
            features: Features = tower(pixels, grid).float().numpy()
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
        import nncf

        logging.getLogger("nncf").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):  # NNCF prints tables and bars
            return nncf.compress_weights(self.fp.clone(), mode=nncf.CompressWeightsMode.INT8_SYM)


def _openvino(models: _OpenVinoModels, variant: str, threads: int) -> Run:
    """Return a variant compiled for the CPU."""
    import openvino

    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    group = OPENVINO[variant]
    if group is not None:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = group
    model = models.fp if variant == "fp" else models.int8
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
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


def _cosines(ours: Features, reference: Features) -> NDArray[np.float64]:
    a, b = ours.astype(np.float64), reference.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: NDArray[np.float64] = (a * b).sum(1) / norms
    return cosines


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
