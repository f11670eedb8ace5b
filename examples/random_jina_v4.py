"""Writes a checkpoint in the layout of jina-embeddings-v4 with random weights.

The files, names, shapes and types are those of the published repository, which cannot be had
everywhere and is not small; the values are random. ``python examples/random_jina_v4.py FOLDER``
writes the tiny one (39 MB), ``--size full`` the one of 3.93 billion parameters (7.9 GB), and with
``--layers 1 --vision-blocks 8`` its widths at a quarter of the tower's depth.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jina_v4_layout as files
import numpy as np
from jina_v4_layout import SIZES, TASKS, Size, adapted_linears, base_shapes, old_prefix
from qwen_vocabulary import write_tokenizer
from random_weights import Floats, RandomWeights, rounded, to_bfloat16

LAYOUTS = ("published", "new", "premerged", "plain")
SHARD_BYTES = 5 * 10**9
REMOTE_CODE = (
    "configuration_jina_embeddings_v4.py",
    *("custom_lora_module.py", "custom_st.py", "modeling_jina_embeddings_v4.py", "qwen2_5_vl.py"),
)


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its name there, its shape, and what makes its values in order."""

    name: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Floats]]

    @property
    def bytes(self) -> int:
        return 2 * math.prod(self.shape)


def write_checkpoint(
    folder: str | Path,
    size: str | Size = "tiny",
    seed: int = 0,
    layout: str = "published",
    *,
    task: str = "retrieval",
    rank: int | None = None,
    alpha: int | None = None,
    prefix: str | None = None,
    threads: int = 2,
) -> Path:
    """Write a checkpoint; the same arguments give the same bytes.

    Args:
        folder: Takes the files; it must be empty or not there yet.
        size: ``"tiny"``, ``"short"`` (the tiny one with a vocabulary of 2,278), ``"full"`` or other sizes.
        seed: Of all values.
        layout: ``"published"``: old key prefix and one adapter file for three tasks. ``"new"``: the
            same with the prefix ``model.language_model``. ``"premerged"``: Qwen2.5-VL with ``task``
            merged into it, without projector. ``"plain"``: Qwen2.5-VL as first published, and a PEFT
            adapter for each task in ``adapter_folder``.
        task: What ``"premerged"`` merges.
        rank: Of the adapters; the size's by default.
        alpha: ``lora_alpha``; by default the rank, in ``"plain"`` twice the rank. The values of B
            are divided by alpha/rank, so that the adapters' strength stays the same.
        prefix: ``"old"`` or ``"new"``, for a layout with the other one than its own.
        threads: How many tensors are made at a time.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder has files.
        ValueError: The layout, the size, the task or the prefix is none of those above.
    """
    folder = Path(folder)
    _check(layout, LAYOUTS, "layout")
    _check(task, TASKS, "task")
    prefix = prefix or ("new" if layout == "new" else "old")
    _check(prefix, ("old", "new"), "prefix")
    if isinstance(size, str):
        _check(size, tuple(SIZES), "size")
        size = SIZES[size]
    for place in (folder, *(adapter_folder(folder, name) for name in TASKS)):
        if place.exists() and any(place.iterdir()):
            raise FileExistsError(f"{place}: expected an empty folder; remove it or name another")
    folder.mkdir(parents=True, exist_ok=True)
    rank = rank or size.rank
    alpha = alpha or (2 * rank if layout == "plain" else rank)
    weights = RandomWeights(size, seed)
    adapters = _Adapters(weights, rank, alpha / rank, projector=layout in ("published", "new"))
    merged = task if layout == "premerged" else None
    base = list(_base_tensors(weights, adapters, merged, old_prefix if prefix == "old" else str))
    _write_shards(folder, base, threads)
    write_settings(folder, layout, size)
    if layout in ("published", "new"):
        for name in REMOTE_CODE:
            code = f'raise RuntimeError("{name}: code of the checkpoint was run")\n'
            (folder / name).write_text(code, "utf-8")
    write_tokenizer(folder, size.merges)
    if layout in ("published", "new"):
        place, stored = folder / "adapters", adapters.tensors(TASKS, multi_task=True)
        _write_adapter(place, stored, rank, alpha, threads, multi_task=True)
    if layout == "plain":
        for name in TASKS:
            place, stored = adapter_folder(folder, name), adapters.tensors([name], multi_task=False)
            _write_adapter(place, stored, rank, alpha, threads, multi_task=False)
    return folder


def adapter_folder(folder: str | Path, task: str) -> Path:
    """Return where ``layout="plain"`` puts a task's adapter: beside the checkpoint's folder."""
    folder = Path(folder)
    return folder.with_name(f"{folder.name}-{task}")


def _check(value: str, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise ValueError(f"{what}: expected one of {', '.join(known)}, found {value!r}")


class _Adapters:
    """The LoRA matrices of all tasks."""

    def __init__(
        self, weights: RandomWeights, rank: int, scaling: float, *, projector: bool
    ) -> None:
        self.weights, self.rank, self.scaling = weights, rank, scaling
        self.linears = adapted_linears(weights.size, projector=projector)

    def matrix(self, module: str, task: str, part: str) -> Floats:
        """A or B of an adapted Linear, as the file has it."""
        out, inputs = self.linears[module]
        if part == "A":
            return self.weights.adapter(module, task, part, (self.rank, inputs))
        values = self.weights.adapter(module, task, part, (out, self.rank))
        return rounded(values / np.float32(self.scaling))

    def merge(self, module: str, task: str, chunks: Iterable[Floats]) -> Iterator[Floats]:
        """A base weight's rows with a task's product added."""
        a, b = self.matrix(module, task, "A"), self.matrix(module, task, "B")
        start = 0
        for chunk in chunks:
            stop = start + len(chunk)
            yield rounded(chunk) + np.float32(self.scaling) * (b[start:stop] @ a)
            start = stop

    def tensors(self, tasks: Iterable[str], *, multi_task: bool) -> list[Stored]:
        """The tensors of an adapter file, sorted by name."""
        found = []
        for task in tasks:
            segment = f".{task}" if multi_task else ""
            for module, (out, inputs) in self.linears.items():
                for part, shape in (("A", (self.rank, inputs)), ("B", (out, self.rank))):
                    name = f"base_model.model.{module}.lora_{part}{segment}.weight"

                    def chunks(m: str = module, t: str = task, p: str = part) -> list[Floats]:
                        return [self.matrix(m, t, p)]

                    found.append(Stored(name, shape, chunks))
        return sorted(found, key=lambda tensor: tensor.name)


def _base_tensors(
    weights: RandomWeights, adapters: _Adapters, merged: str | None, rename: Callable[[str], str]
) -> Iterator[Stored]:
    """The tensors of the shards, in order; ``merged`` is the task that is merged into them."""
    for name, shape in base_shapes(weights.size, projector=files.PROJECTOR in adapters.linears):

        def chunks(name: str = name, shape: tuple[int, ...] = shape) -> Iterator[Floats]:
            rows = weights.rows(name, shape)
            module = name.removesuffix(".weight")
            if merged is not None and module in adapters.linears:
                return adapters.merge(module, merged, rows)
            return rows

        yield Stored(rename(name), shape, chunks)


def split_shards(tensors: Sequence[Stored]) -> list[list[Stored]]:
    """Return the tensors of each shard: 5 GB at most, and less where that would be one shard."""
    sizes = [tensor.bytes for tensor in tensors]
    total, largest = sum(sizes), max(sizes)
    limit = min(SHARD_BYTES, largest + 4 * (total - largest) // 5)  # a small one breaks in a layer
    shards: list[list[Stored]] = [[]]
    for tensor in tensors:
        if sum(t.bytes for t in shards[-1]) + tensor.bytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _write_shards(folder: Path, tensors: Sequence[Stored], threads: int) -> None:
    shards = split_shards(tensors)
    total = sum(tensor.bytes for tensor in tensors)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_safetensors(folder / name, shard, threads)
        where |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_adapter(
    folder: Path, tensors: list[Stored], rank: int, alpha: int, threads: int, *, multi_task: bool
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_safetensors(folder / "adapter_model.safetensors", tensors, threads)
    settings = files.adapter_config(rank=rank, alpha=alpha, multi_task=multi_task)
    _write_json(folder / "adapter_config.json", settings)


def _write_safetensors(path: Path, tensors: list[Stored], threads: int) -> None:
    """Write bfloat16 tensors, each as it is made, at the place that the header gives it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets = [0]
    for tensor in tensors:
        span = [offsets[-1], offsets[-1] + tensor.bytes]
        offsets.append(span[1])
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with path.open("wb") as file, ThreadPoolExecutor(threads) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        os.truncate(path, start + offsets[-1])

        def write(tensor: Stored, offset: int) -> None:
            for chunk in tensor.chunks():
                bits = to_bfloat16(chunk).tobytes()
                offset += os.pwrite(file.fileno(), bits, offset)

        jobs = [
            pool.submit(write, tensor, start + offset)
            for tensor, offset in zip(tensors, offsets, strict=False)
        ]
        for job in jobs:
            job.result()


def write_settings(folder: Path, layout: str, size: Size) -> None:
    """Write every JSON file of a checkpoint but the tokenizer's and the adapter's."""
    _write_json(folder / "preprocessor_config.json", files.preprocessor_config(layout))
    if layout in ("premerged", "plain"):
        config = files.merged_config if layout == "premerged" else files.stock_config
        _write_json(folder / "config.json", config(size))
        return
    _write_json(folder / "config.json", files.published_config(size))
    # as in the repositories beside it: these two could not be seen themselves
    module = {"idx": 0, "name": "0", "path": "", "type": "custom_st.Transformer"}
    _write_json(folder / "modules.json", [{**module, "kwargs": ["task", "truncate_dim"]}])
    prompts = {"query": "Query: ", "passage": "Passage: "}
    extra = {"default_prompt_name": None, "prompts": prompts, "similarity_fn_name": "cosine"}
    _write_json(folder / "config_sentence_transformers.json", extra)


def _write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def main() -> None:
    """Read the command line and write one checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="takes the files")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=LAYOUTS, default="published")
    parser.add_argument("--task", choices=TASKS, default="retrieval", help="that premerged merges")
    parser.add_argument("--rank", type=int, help="of the adapters")
    parser.add_argument("--alpha", type=int, help="lora_alpha")
    parser.add_argument("--prefix", choices=("old", "new"), help="of the base tensors' names")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, help="of the language model, the size's by default")
    parser.add_argument("--vision-blocks", type=int, help="of the tower, the size's by default")
    args = vars(parser.parse_args())
    args["size"] = shallower(SIZES[args["size"]], args.pop("layers"), args.pop("vision_blocks"))
    write_checkpoint(**args)


def shallower(size: Size, layers: int | None, vision_blocks: int | None) -> Size:
    """Return a size with fewer layers; at least the last block of the tower sees whole images."""
    if layers is not None:
        size = replace(size, layers=layers)
    if vision_blocks is not None:
        full = [block for block in size.full_attention_blocks if block < vision_blocks]
        full = full or [vision_blocks - 1]
        size = replace(size, vision_depth=vision_blocks, full_attention_blocks=tuple(full))
    return size


if __name__ == "__main__":
    main()
