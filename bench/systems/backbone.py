"""A transformers model with a PEFT adapter on it, every tensor of the adapter accounted for."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel

from embedge.bench.errors import BenchArgumentError, BenchError
from embedge.bench.systems.quantized_base import (
    check_readable,
    quantize_linears,
    restore_linears,
)
from embedge.bench.systems.source import is_jina_v4
from embedge.runtime.bundle.manifest import BaseQuantization

__all__ = ["Inner", "adapter_folder", "find_adapter", "load_backbone", "merge"]

HEAD = "multi_vector_projector"
HEAD_WIDTH = "multi_vector_projector_dim"


class Inner(torch.nn.Module):
    """Puts a backbone where a model with a head has it: adapters trained there say ``model.…``.

    Of heads, there is the multi-vector one, where the checkpoint has it, so that an adapter's tensors
    for it find their place. The hidden states come from the backbone alone.
    """

    def __init__(self, model: Any, transformer: Path) -> None:
        super().__init__()
        self.config = model.config
        self.base_model_prefix = ""  # PEFT of transformers 5 asks for it
        self.model = model
        if getattr(model.config, HEAD_WIDTH, None) is not None:
            self.multi_vector_projector = _multi_vector_head(transformer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


# From the names of the tensors on disk to those of transformers' Qwen2_5_VLModel.
_JINA_V4_NAMES = {
    r"^model\.visual\.": "visual.",
    r"^model\.language_model\.": "language_model.",
    r"^model\.(?!language_model\.|visual\.)": "language_model.",
}
_JINA_V4_KEYS = (
    *("text_config", "vision_config", "image_token_id", "video_token_id"),
    *("vision_start_token_id", "vision_end_token_id"),
)


def find_adapter(name: str, folder: str | Path) -> Path | None:
    """Return ``folder``, or ``folder/name``, whichever has an adapter_config.json; ``None`` if neither has."""
    candidates = (Path(folder), Path(folder) / name)
    return next((path for path in candidates if (path / "adapter_config.json").is_file()), None)


def adapter_folder(name: str, folder: str | Path) -> Path:
    """Return the adapter's own folder: ``folder``, or ``folder/name`` where it holds several.

    Raises:
        BenchError: neither has an adapter_config.json.
    """
    found = find_adapter(name, folder)
    if found is None:
        raise BenchArgumentError(
            f"--adapter {name}={folder}: no adapter_config.json there or in {Path(folder) / name}"
        )
    return found


def load_backbone(
    transformer: Path,
    adapter: str | Path | None = None,
    quantization: BaseQuantization | None = None,
    task: str | None = None,
) -> Any:
    """Return the model in float32, the adapter applied by PEFT and not merged.

    Args:
        transformer: the folder with config.json and the weights.
        adapter: a folder in PEFT's format, ``None`` for none.
        quantization: how bitsandbytes had quantized the base when the adapter was trained, ``None``: not.
        task: which of them, where one file holds the adapters of several tasks.

    Raises:
        BenchError: tensors of the adapter that find no place in the model, or bitsandbytes is needed and missing.
    """
    if adapter is None:
        return _backbone(transformer, quantization)
    attempts = []
    for wrap in (lambda model: model, lambda model: Inner(model, transformer)):
        with _of_task(Path(adapter), task) as folder:
            model, left_over = _apply(
                wrap(_backbone(transformer, quantization)), folder, transformer
            )
        if not left_over:
            return model
        attempts.append(left_over)
    left_over = min(attempts, key=len)
    raise BenchError(
        f"{adapter}: {len(left_over)} tensors of the adapter find no place in {transformer}: "
        + ", ".join(left_over[:5])
    )


def merge(model: Any) -> Any:
    """Return the bare torch model of a PEFT model, with the adapter added to its weights."""
    merged = model.merge_and_unload()
    return merged.model if isinstance(merged, Inner) else merged


@contextmanager
def _of_task(folder: Path, task: str | None) -> Iterator[Path]:
    """Give an adapter's folder as PEFT reads it; of a file with several tasks' tensors, as v4's, a copy of one's."""
    file = folder / "adapter_model.safetensors"
    segment = f".{task}.weight"
    if task is None or not file.is_file():
        yield folder
        return
    with safe_open(file, "pt") as tensors:
        names = [name for name in tensors.keys() if name.endswith(segment)]
        own = {f"{name.removesuffix(segment)}.weight": tensors.get_tensor(name) for name in names}
    if not own:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="embedge-bench-") as copy:
        save_file(own, Path(copy) / file.name)
        settings = (folder / "adapter_config.json").read_text("utf-8")
        (Path(copy) / "adapter_config.json").write_text(settings, "utf-8")
        yield Path(copy)


def _multi_vector_head(transformer: Path) -> torch.nn.Linear:
    """Return the Linear ``multi_vector_projector`` of a checkpoint.

    Raises:
        BenchError: config.json has its width, and no weight file has the Linear.
    """
    found: dict[str, torch.Tensor] = {}
    for file in sorted(transformer.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if name.startswith(f"{HEAD}.")]
            found |= {name: tensors.get_tensor(name).float() for name in names}
    weight, bias = found.get(f"{HEAD}.weight"), found.get(f"{HEAD}.bias")
    if weight is None:
        raise BenchError(
            f"{transformer}: config.json has {HEAD_WIDTH}, expected {HEAD}.weight in a safetensors "
            "file, found none"
        )
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    head.weight.data = weight
    if bias is not None:
        head.bias.data = bias
    return head


def _backbone(transformer: Path, quantization: BaseQuantization | None) -> Any:
    config = json.loads((transformer / "config.json").read_text("utf-8"))
    if is_jina_v4(transformer):
        if quantization is not None:
            raise BenchError(
                f"{transformer}: the reference of jina-embeddings-v4 is not of a quantized base; expected a bundle "
                "without --base-quantization"
            )
        return _jina_v4(transformer, config)
    if config.get("model_type") == "jina_embeddings_v5":
        if quantization is not None:
            raise BenchError(
                f"{transformer}: transformers has no class of its own for {config['model_type']} that bitsandbytes "
                "could quantize, so that there is no reference for a base that was; expected a bundle without "
                "--base-quantization"
            )
        return _jina_v5(transformer, config)
    stored_quantized = bool(config.get("quantization_config"))
    if stored_quantized:
        check_readable(transformer)
    model = AutoModel.from_pretrained(transformer, dtype=torch.float32).eval()
    if stored_quantized:
        return restore_linears(model)
    return model if quantization is None else quantize_linears(model, transformer, quantization)


def _jina_v4(transformer: Path, config: dict[str, Any]) -> Any:
    """Qwen2.5-VL without its head, from which jina-embeddings-v4 was trained; its own class is remote code."""
    settings = transformers.Qwen2_5_VLConfig(**{key: config[key] for key in _JINA_V4_KEYS})
    setattr(settings, HEAD_WIDTH, config.get(HEAD_WIDTH))
    loader: Any = transformers.Qwen2_5_VLModel
    model, info = loader.from_pretrained(
        transformer,
        config=settings,
        dtype=torch.float32,
        output_loading_info=True,
        key_mapping=_JINA_V4_NAMES,
    )
    strange = {*info["missing_keys"], *info["unexpected_keys"]}
    if strange := {name for name in strange if not name.startswith(f"{HEAD}.")}:
        raise BenchError(
            f"{transformer}: the tensors are not those of Qwen2.5-VL: {', '.join(sorted(strange)[:5])}"
        )
    return model.eval()


def _jina_v5(transformer: Path, config: dict[str, Any]) -> Any:
    """The backbone that jina-embeddings-v5-text was trained from: EuroBERT, or Qwen3 as a decoder.

    Its own class is remote code, which is not run; the tensors are named as the backbone's.
    """
    kind = "qwen3" if config.get("is_decoder", True) else "eurobert"
    if kind not in CONFIG_MAPPING:
        raise BenchError(
            f"{transformer}: the reference of jina-embeddings-v5-text-nano is transformers' EuroBert, "
            f"which this transformers ({transformers.__version__}) does not have; run: "
            'pip install "transformers>=5.24"'
        )
    own = ("architectures", "auto_map", "is_decoder", "model_type", "task_names", "torch_dtype")
    kept = {key: value for key, value in config.items() if key not in own}
    settings = CONFIG_MAPPING[kind](**kept)
    model, info = MODEL_MAPPING[type(settings)].from_pretrained(
        transformer, config=settings, dtype=torch.float32, output_loading_info=True
    )
    if strange := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise BenchError(
            f"{transformer}: the tensors are not those of {kind}: {', '.join(strange[:5])}"
        )
    return model.eval()


def _apply(model: Any, folder: Path, transformer: Path) -> tuple[Any, list[str]]:
    """Return the model with the adapter on it, and the adapter's keys that PEFT did not place."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = PeftConfig.from_pretrained(str(folder))
    # A local folder, as PEFT would else ask the hub for the base model's vocabulary.
    config.base_model_name_or_path = str(transformer)
    config.task_type = None  # PEFT's task classes add nothing to a forward pass without labels
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, str(folder), config=config).eval()
        except ValueError as error:  # no module has a name that the adapter targets
            return model, [str(error)]
    placed = set(get_peft_model_state_dict(adapted))
    stored = load_peft_weights(str(folder), device="cpu")
    return adapted, sorted(set(stored) - placed)
