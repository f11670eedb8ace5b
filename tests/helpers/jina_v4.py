"""jina-embeddings-v4 in torch: transformers' Qwen2.5-VL, with LoRA merged by hand, pooled by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import random_jina_v4
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from random_jina_v4 import adapter_folder
from safetensors import safe_open

from embedge.bench.systems.qwen_vl import image_processor_class, no_init_weights, rope_positions

__all__ = ["TASKS", "Reference", "adapter_folder", "write_checkpoint"]


def write_checkpoint(folder: Path, size: str = "short", **options: Any) -> Path:
    """A random checkpoint, of few words unless another size is named."""
    return random_jina_v4.write_checkpoint(folder, size, **options)


TASKS = ("retrieval", "text-matching", "code")
IMAGE_PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|>\n"
)
RENAMES = (  # from the layout on disk to that of Qwen2_5_VLForConditionalGeneration
    (re.compile(r"^visual"), "model.visual"),
    (re.compile(r"^model(?!\.(language_model|visual))"), "model.language_model"),
)

Floats = NDArray[np.float32]
Vectors = tuple[Floats, list[Floats]]
Adapter = dict[str, tuple[torch.Tensor, torch.Tensor, float]]


@dataclass
class Reference:
    """The model in torch with one task's adapter merged, as the model's authors run it.

    Args:
        folder: the checkpoint.
        task: whose adapter to take from the checkpoint's ``adapters/``, if it has one.
        adapter: a PEFT folder with an adapter of one task, instead.
        without: adapted modules by the end of their name, such as "q_proj", left as they are.
        dtype: of the weights; LoRA is merged in float32 in any case.
        attention: transformers' name of the implementation.
    """

    folder: Path
    task: str | None = None
    adapter: Path | None = None
    without: Sequence[str] = ()
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        settings = json.loads((self.folder / "config.json").read_text())
        if "text_config" in settings:  # what lies beside it is jina's or a copy
            wanted = ["text_config", "vision_config", "image_token_id", "video_token_id"]
            wanted += ("vision_start_token_id", "vision_end_token_id")
            settings = {name: settings[name] for name in wanted}
        config = transformers.Qwen2_5_VLConfig(**settings)
        for part in (config, config.text_config, config.vision_config):
            part.dtype = self.dtype  # else each part is made in the type of the file
        with no_init_weights():
            self.model = transformers.Qwen2_5_VLModel._from_config(
                config, attn_implementation=self.attention, dtype=self.dtype
            )
        self._load()
        self.model.eval()
        self.tokenizer = transformers.Qwen2Tokenizer.from_pretrained(self.folder)
        self.processor = image_processor_class().from_pretrained(self.folder)

    @torch.no_grad()
    def texts(self, texts: Sequence[str], prompt: str = "", batch_size: int = 8) -> Vectors:
        """Vectors of texts, each behind the prompt, in padded batches.

        Returns:
            float32 ``[texts, hidden]``, and for each text float32 ``[tokens, 128]``, or an empty
            list where the checkpoint has no projector.
        """
        rows = [self.tokenizer(prompt + text)["input_ids"][:32768] for text in texts]
        found = []
        for start in range(0, len(rows), batch_size):
            ids, mask = self._padded(rows[start : start + batch_size])
            states = self._states(ids, mask)
            found.append(self._pooled(states, mask, mask))
        return _joined(found)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image], batch_size: int = 4, **pixels: int) -> Vectors:
        """Vectors of images; ``pixels`` are ``min_pixels`` and ``max_pixels`` of the processor."""
        names = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
        size = {edge: self.processor.size[edge] for edge in names.values()}
        size |= {names[name]: count for name, count in pixels.items()}
        found = []
        for start in range(0, len(images), batch_size):
            some = list(images[start : start + batch_size])
            patches = self.processor(some, return_tensors="pt", size=size)
            grids = patches["image_grid_thw"]
            rows = [self.image_ids(int(grid.prod()) // 4) for grid in grids]
            ids, mask = self._padded(rows)
            states = self._states(
                ids, mask, image_grid_thw=grids, pixel_values=patches["pixel_values"].to(self.dtype)
            )
            found.append(self._pooled(states, mask, self._between_markers(ids)))
        return _joined(found)

    def image_ids(self, count: int) -> list[int]:
        """The prompt of an image of ``count`` tokens."""
        prompt = IMAGE_PROMPT.replace("<|image_pad|>", "<|image_pad|>" * count)
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        return ids

    def _padded(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return ids, mask

    def _states(self, ids: torch.Tensor, mask: torch.Tensor, **image: torch.Tensor) -> torch.Tensor:
        """The hidden states behind the last norm, float32 ``[rows, tokens, hidden]``."""
        positions = rope_positions(self.model, ids, image.get("image_grid_thw"), mask)
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **image
        )
        states: torch.Tensor = output.last_hidden_state.float()
        return states

    def _between_markers(self, ids: torch.Tensor) -> torch.Tensor:
        """1 from vision_start to vision_end, both included."""
        config = self.model.config
        starts = (ids == config.vision_start_token_id).int().argmax(1, keepdim=True)
        ends = (ids == config.vision_end_token_id).int().argmax(1, keepdim=True)
        places = torch.arange(ids.shape[1])[None]
        return ((places >= starts) & (places <= ends)).long()

    def _pooled(self, states: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor) -> Vectors:
        weights = pooled[..., None].float()
        single = (states * weights).sum(1) / weights.sum(1)
        single = torch.nn.functional.normalize(single, dim=-1)
        if self.projector is None:
            return single.numpy(), []
        weight, bias = self.projector
        multi = torch.nn.functional.normalize(states @ weight.T + bias, dim=-1)
        return single.numpy(), [row[m == 1].numpy() for row, m in zip(multi, mask, strict=True)]

    def _load(self) -> None:
        """Fill the model from the shards, adding the adapter; every tensor has to have its place."""
        adapter = self._adapter()
        missing = dict(self.model.named_parameters())
        projector = {}
        for stored, base in _tensors(self.folder):
            name = stored
            for pattern, replacement in RENAMES:
                name = pattern.sub(replacement, name)
            tensor = self._merged(name.removesuffix(".weight"), base, adapter)
            if name.startswith("multi_vector_projector."):
                projector[name.rpartition(".")[2]] = tensor
                continue
            parameter = missing.pop(name.removeprefix("model."))
            assert parameter.shape == tensor.shape and parameter.dtype == self.dtype, name
            parameter.data.copy_(tensor)
        assert not missing and not adapter, (missing.keys(), adapter.keys())
        self.projector = (projector["weight"], projector["bias"]) if projector else None

    def _merged(self, module: str, base: torch.Tensor, adapter: Adapter) -> torch.Tensor:
        if module not in adapter:
            return base
        a, b, scaling = adapter.pop(module)
        return base if module.endswith(tuple(self.without)) else base + scaling * (b @ a)

    def _adapter(self) -> Adapter:
        """A, B and the scaling of each adapted module, by the module's name."""
        place, segment = self.adapter, ""
        if place is None:
            if self.task is None or not (self.folder / "adapters").exists():
                return {}
            place, segment = self.folder / "adapters", f".{self.task}"
        settings = json.loads((place / "adapter_config.json").read_text())
        scaling = settings["lora_alpha"] / settings["r"]
        with safe_open(place / "adapter_model.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.endswith(f"{segment}.weight")]
            tensors = {name: file.get_tensor(name).float() for name in names}
        ending = f".lora_A{segment}.weight"
        found = {}
        for name, a in tensors.items():
            if name.endswith(ending):
                module = name.removesuffix(ending)
                b = tensors[f"{module}.lora_B{segment}.weight"]
                found[module.removeprefix("base_model.model.")] = (a, b, scaling)
        return found


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of all shards, one at a time, in float32."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    places: Mapping[str, str] = index["weight_map"]
    for shard in sorted(set(places.values())):
        with safe_open(folder / shard, "pt") as file:
            assert set(file.keys()) == {name for name in places if places[name] == shard}
            for name in file.keys():
                yield name, file.get_tensor(name).float()


def _joined(found: Sequence[Vectors]) -> Vectors:
    return np.concatenate([single for single, _ in found]), [
        row for _, rows in found for row in rows
    ]
