"""One page image, end to end from a PNG file, beside torch: ``python -m embedge.bench.studies.image_stages``.

Seconds per stage of a jina-embeddings-v4 bundle (decode, prepare, vision tower, language tower) and of
the same checkpoint in torch, each system in a process of its own, one after the other: the full-size
model in float32 leaves no room for a second one. The stages of one system are timed ``--runs`` times and
the median is shown. Vectors are compared, with the adapter merged in torch by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.bench.errors import BenchError
from embedge.bench.measure.process import run_child
from embedge.bench.studies.qwen_vision import page
from embedge.bench.systems.qwen_vl import (
    image_processor_class,
    no_init_weights,
    rope_positions,
    vision_features,
)
from embedge.quant.fidelity import cosine_rows

__all__ = ["main"]

Vector = NDArray[np.float32]
_Stages = Sequence[tuple[str, Callable[[Any], Any]]]
_STAGES = ("decode", "prepare", "vision", "language", "total")
_RENAMES = (
    (re.compile(r"^visual"), "model.visual"),
    (re.compile(r"^model(?!\.(language_model|visual))"), "model.language_model"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="embedge.bench.studies.image_stages", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--precision", nargs="+", default=["int8"])
    parser.add_argument("--torch", nargs="*", default=["float32", "bfloat16"], metavar="DTYPE")
    parser.add_argument("--task", default="retrieval")
    parser.add_argument("--image", type=Path, help="a PNG; default: noise of 768 features")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        kind, name = options.child
        measure = _embedge if kind == "embedge" else _torch
        print(json.dumps(measure(options, name)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        image = options.image or Path(folder) / "page.png"
        if options.image is None:
            page(672, 896).save(image)  # 24 x 32 features
        systems = [("embedge", p) for p in options.precision]
        systems += [("torch", d) for d in options.torch]
        results = {
            f"{kind} {name}": _in_child(options, image, kind, name) for kind, name in systems
        }
    _show(results)
    return 0


def _in_child(options: argparse.Namespace, image: Path, kind: str, name: str) -> dict[str, Any]:
    command = ["-m", "embedge.bench.studies.image_stages"]
    command += [str(options.bundle), str(options.checkpoint), "--task", options.task]
    command += ["--image", str(image), "--threads", str(options.threads)]
    command += ["--runs", str(options.runs), "--child", kind, name]
    return run_child(command, f"{kind} {name}")


def _timed(stages: _Stages, runs: int) -> dict[str, Any]:
    """Run the stages one after the other, each with the result of the one before."""
    seconds: dict[str, list[float]] = {name: [] for name in _STAGES}
    value: Any = None
    for number in range(runs + 1):
        value, begin = None, time.perf_counter()
        for name, stage in stages:
            start = time.perf_counter()
            value = stage(value)
            if number:  # the first run warms up
                seconds[name].append(time.perf_counter() - start)
        if number:
            seconds["total"].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {"seconds": medians, "vector": np.asarray(value, np.float64).tolist()}


def _embedge(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    from embedge.runtime.bundle.folder import Bundle
    from embedge.runtime.images.layout import image_layout, vision_inputs
    from embedge.runtime.images.load import load_image
    from embedge.runtime.images.patches import ImageProcessor
    from embedge.runtime.sessions.session import SessionConfig, open_graph

    bundle = Bundle(options.bundle)
    image = bundle.manifest.model.image
    if image is None:
        raise BenchError(f"{options.bundle}: expected a bundle with a vision tower, found none")
    process = ImageProcessor(image)

    config = SessionConfig(threads=options.threads)
    tower = open_graph(bundle, precision, "vision", config)
    task = open_graph(bundle, precision, options.task, config)

    def language(seen: tuple[Any, Any]) -> Vector:
        patches, features = seen
        row = image_layout(patches.grid, image, pooled_only=True)
        ones = np.ones((1, len(row.ids)), np.int64)
        places = np.stack([np.zeros_like(row.features), row.features], axis=1)
        inputs = {
            "input_ids": row.ids[None],
            "attention_mask": ones,
            "position_ids": row.positions[:, None],
            "pool_mask": row.pooled[None].astype(np.int64),
            "image_features": features[0],
            "image_positions": places,
        }
        vector: Vector = task.run("embedding", inputs)[0]
        return vector

    def vision(patches: Any) -> tuple[Any, Any]:
        return patches, tower.run("image_features", vision_inputs([patches], image))

    stages: _Stages = [
        ("decode", lambda _: load_image(options.image, "image")),
        ("prepare", process),
        ("vision", vision),
        ("language", language),
    ]
    return _timed(stages, options.runs)


def _torch(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    import torch
    from PIL import Image
    from transformers import AutoTokenizer

    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    model = _load(options.checkpoint, options.task, getattr(torch, dtype))
    processor = image_processor_class().from_pretrained(options.checkpoint)
    read: Any = AutoTokenizer.from_pretrained  # untyped
    tokenizer = read(options.checkpoint, local_files_only=True)
    config = model.config

    def prepare(picture: Any) -> Any:
        patches = processor(picture, return_tensors="pt")
        count = int(patches["image_grid_thw"].prod()) // 4
        prompt = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * count
        prompt += "<|vision_end|>Describe the image.<|im_end|>\n"
        return patches, torch.tensor([tokenizer(prompt)["input_ids"]])

    def vision(prepared: Any) -> Any:
        patches, ids = prepared
        pixels = patches["pixel_values"].to(model.dtype)
        features = vision_features(model.visual, pixels, patches["image_grid_thw"])
        return features, patches["image_grid_thw"], ids

    def language(seen: Any) -> Any:
        features, grid, ids = seen
        states = model.language_model.embed_tokens(ids)
        states[ids == config.image_token_id] = features
        mask = torch.ones_like(ids)
        positions = rope_positions(model, ids, grid, mask)
        output = model.language_model(
            inputs_embeds=states, attention_mask=mask, position_ids=positions, use_cache=False
        )
        hidden = output.last_hidden_state[0].float()
        start = int((ids[0] == config.vision_start_token_id).int().argmax())
        end = int((ids[0] == config.vision_end_token_id).int().argmax())
        return torch.nn.functional.normalize(hidden[start : end + 1].mean(0), dim=-1).numpy()

    stages: _Stages = [
        ("decode", lambda _: Image.open(options.image).convert("RGB")),
        ("prepare", prepare),
        ("vision", vision),
        ("language", language),
    ]
    return _timed(stages, 1 if dtype == "float32" else options.runs)


def _load(folder: Path, task: str, dtype: Any) -> Any:
    """The Qwen2.5-VL of transformers with one task's adapter merged by hand."""
    import torch
    import transformers
    from safetensors import safe_open

    settings = json.loads((folder / "config.json").read_text("utf-8"))
    wanted = ["text_config", "vision_config", "image_token_id", "video_token_id"]
    wanted += ["vision_start_token_id", "vision_end_token_id"]
    make: Any = transformers.Qwen2_5_VLConfig  # untyped
    config = make(**{name: settings[name] for name in wanted})
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    with no_init_weights():
        model = transformers.Qwen2_5_VLModel._from_config(
            config, attn_implementation="sdpa", dtype=dtype
        )
    place = folder / "adapters"
    lora = json.loads((place / "adapter_config.json").read_text("utf-8"))
    scaling = lora["lora_alpha"] / lora["r"]
    parameters = dict(model.named_parameters())
    with safe_open(place / "adapter_model.safetensors", "pt") as adapter:
        keys = set(adapter.keys())
        for name, base in _tensors(folder):
            tensor = base
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_A.{task}.weight"
            if key in keys:
                a = adapter.get_tensor(key).float()
                b = adapter.get_tensor(key.replace("lora_A", "lora_B")).float()
                tensor = base.float() + scaling * (b @ a)
            if name.startswith("multi_vector_projector."):
                continue
            parameters.pop(name.removeprefix("model.")).data.copy_(tensor)
    if parameters:
        raise BenchError(f"{folder}: no tensors for {', '.join(sorted(parameters)[:5])}")
    assert isinstance(model, torch.nn.Module)
    return model.eval()


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(folder / shard, "pt") as file:
            for stored in file.keys():
                name = stored
                for pattern, replacement in _RENAMES:
                    name = pattern.sub(replacement, name)
                yield name, file.get_tensor(stored)


def _show(results: dict[str, dict[str, Any]]) -> None:
    reference = next((r for name, r in results.items() if name == "torch float32"), None)
    print(
        f"{'seconds':18s}" + "".join(f"{stage:>10s}" for stage in _STAGES) + "    ratio    cosine"
    )
    for name, result in results.items():
        times = result["seconds"]
        line = f"{name:18s}" + "".join(f"{times[stage]:10.3f}" for stage in _STAGES)
        if reference is not None:
            a, b = np.array([result["vector"]]), np.array([reference["vector"]])
            cosine = cosine_rows(a, b)[0]
            line += f"{reference['seconds']['total'] / times['total']:9.2f}{cosine:10.5f}"
        print(line)


if __name__ == "__main__":
    sys.exit(main())
