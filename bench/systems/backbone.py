"""A transformers model with a PEFT adapter on it, every tensor of the adapter accounted for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel

from embedge.bench.errors import BenchArgumentError, BenchError
from embedge.bench.systems.quantized_base import (
    check_readable,
    quantize_linears,
    restore_linears,
)
from embedge.runtime.bundle.manifest import BaseQuantization

__all__ = ["adapter_folder", "load_backbone", "merge"]

HEAD = "multi_vector_projector"
HEAD_WIDTH = "multi_vector_projector_dim"


class _Inner(torch.nn.Module):
    """Puts a backbone where a model with a head has it: adapters trained there say ``model.…``.

    Of heads, there is the multi-vector one, where the checkpoint has it, so that an adapter's tensors
    for it find their place. The hidden states come from the backbone alone.
    """

    def __init__(self, model: Any, transformer: Path) -> None:
        super().__init__()
        self.config = model.config
        self.model = model
        if getattr(model.config, HEAD_WIDTH, None) is not None:
            self.multi_vector_projector = _multi_vector_head(transformer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def adapter_folder(name: str, folder: str | Path) -> Path:
    """Return the adapter's own folder: ``folder``, or ``folder/name`` where it holds several.

    Raises:
        BenchError: neither has an adapter_config.json.
    """
    for candidate in (Path(folder), Path(folder) / name):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    raise BenchArgumentError(
        f"--adapter {name}={folder}: no adapter_config.json there or in {Path(folder) / name}"
    )


def load_backbone(
    transformer: Path,
    adapter: str | Path | None = None,
    quantization: BaseQuantization | None = None,
) -> Any:
    """Return the model in float32, the adapter applied by PEFT and not merged.

    Args:
        transformer: the folder with config.json and the weights.
        adapter: a folder in PEFT's format, ``None`` for none.
        quantization: how bitsandbytes had quantized the base when the adapter was trained, ``None``: not.

    Raises:
        BenchError: tensors of the adapter that find no place in the model, or bitsandbytes is needed and missing.
    """
    if adapter is None:
        return _backbone(transformer, quantization)
    attempts = []
    for wrap in (lambda model: model, lambda model: _Inner(model, transformer)):
        model, left_over = _apply(
            wrap(_backbone(transformer, quantization)), Path(adapter), transformer
        )
        if not left_over:
            return model
        attempts.append(left_over)
    left_over = min(attempts, key=len)
    raise BenchError(
        f"{adapter}: {len(left_over)} tensors of the adapter find no place in {transformer}: "
        + ", ".join(left_over)
    )


def merge(model: Any) -> Any:
    """Return the bare torch model of a PEFT model, with the adapter added to its weights."""
    merged = model.merge_and_unload()
    return merged.model if isinstance(merged, _Inner) else merged


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
