"""What every peer starts from: the merged model of one task, as torch and as ONNX."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from embedge.bench.errors import BenchArgumentError
from embedge.bench.systems.reference import Reference
from embedge.bench.systems.source import Source
from embedge.bench.systems.tokens import TextTokens

__all__ = ["PeerContext", "installed", "kept_folder"]

_STAMP = "made-of.json"
_MAKERS = (
    *("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "optimum-onnx"),
    *("openvino", "nncf", "gguf", "llama-cpp-python"),
)


@dataclass(kw_only=True)
class PeerContext:
    """One task's merged model and a folder for what peers make of it.

    Attributes:
        merged: torch, fp32, the adapter added to the weights.
        threads: threads of every session.
        workdir: an existing folder, the caller's to remove or, a :func:`kept_folder`, to keep.
    """

    merged: Reference
    threads: int
    workdir: Path

    @property
    def source(self) -> Source:
        """The model's settings."""
        return self.merged.source

    @property
    def tokens(self) -> TextTokens:
        """The model's tokenizer."""
        return self.merged.tokens

    @property
    def config(self) -> Any:
        """The transformer's configuration."""
        return self.merged.backbone.config

    def made(self, name: str, write: Callable[[Path], object]) -> Path:
        """Return the folder ``name`` of the workdir, which holds what ``write`` puts there on the first call.

        Args:
            name: of the folder.
            write: fills a new, empty folder; if it raises, or the process ends meanwhile, the next call begins anew.
        """
        folder = self.workdir / name
        if not folder.is_dir():
            part = self.workdir / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            write(part)
            part.rename(folder)
        return folder

    def onnx(self) -> Path:
        """Return an fp32 export, made on the first call: optimum's where it is installed, else torch's."""
        export = _by_optimum if installed("optimum.exporters.onnx") else _by_torch
        folder = self.made("exported", lambda folder: export(self.merged.backbone, folder))
        return folder / "model.onnx"


def kept_folder(folder: Path, merged: Reference) -> Path:
    """Return ``folder``, made if it is not there, for the files that peers make of a model.

    It notes the model and the versions of the packages that make files. So no file is taken for another model's.

    Raises:
        BenchArgumentError: its files are of another model or by other versions, or it notes nothing and is not empty.
    """
    made_of = {"weights": _digest(merged.backbone), "versions": _versions()}
    stamp = folder / _STAMP
    folder.mkdir(parents=True, exist_ok=True)
    if not stamp.exists() and not any(folder.iterdir()):
        stamp.write_text(json.dumps(made_of, indent=1) + "\n", encoding="utf-8")
        return folder
    try:
        found = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or set(found) != set(made_of):
        raise BenchArgumentError(
            f"--peer-files {folder}: expected an empty folder, or one with {_STAMP} of an earlier run; name another"
        )
    other = [key for key, value in made_of.items() if found[key] != value]
    if other:
        raise BenchArgumentError(
            f"--peer-files {folder}: its files were made of other {' and '.join(other)}; remove it, or name another"
        )
    return folder


def _digest(model: Any) -> str:
    """Hash a module's names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)};".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in _MAKERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def installed(name: str) -> bool:
    """Whether there is a module of that name, in packages that need not be there and go with the others."""
    if name.startswith("optimum.") and transformers_version() >= (4, 58):
        return False  # optimum-onnx takes none newer
    try:
        return find_spec(name) is not None
    except ImportError:  # a parent package is missing
        return False


def transformers_version() -> tuple[int, ...]:
    """Its first two numbers."""
    return tuple(map(int, version("transformers").split(".")[:2]))


def _by_optimum(model: Any, folder: Path) -> None:
    logging.getLogger("optimum").setLevel(logging.ERROR)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optimum.exporters.onnx import onnx_export_from_model

        onnx_export_from_model(
            model, folder, task="feature-extraction", opset=18, do_validation=False
        )


class _HiddenStates(torch.nn.Module):
    """A backbone with two inputs and one output."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden


def _by_torch(model: Any, folder: Path) -> None:
    """``torch.onnx``, which follows the classes of every transformers; it needs onnxscript."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    ids = torch.arange(14).reshape(2, 7)
    names = ["input_ids", "attention_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _HiddenStates(model).eval(),
            (ids, torch.ones_like(ids)),  # two tensors: one would be one input of the graph
            folder / "model.onnx",
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_shapes=dict.fromkeys(names, axes),
            dynamo=True,
            opset_version=18,
            external_data=True,
            verbose=False,
        )
