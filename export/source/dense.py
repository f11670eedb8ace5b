"""The Dense layers that some sentence-transformers models apply to the pooled vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedge.export.errors import CheckpointError
from embedge.export.source.config import words
from embedge.export.source.json_files import read_json_object
from embedge.export.source.safetensors_file import SafetensorsFile
from embedge.export.source.weight_files import weight_files

__all__ = ["DenseLayer", "linear_dense", "read_dense"]

# sentence-transformers stores the class's full name; its default is Tanh.
_ACTIVATIONS = {
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "Sigmoid": "sigmoid",
    "SiLU": "silu",
}
_KNOWN_KEYS = words(
    "in_features out_features bias activation_function module_input_name module_output_name use_residual"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseLayer:
    """``activation(x @ weight.T + bias) + x @ residual.T`` on the pooled vector, or on that of a token.

    Attributes:
        in_features: length of the vector that comes in.
        out_features: length of the vector that goes out.
        weight: float32 ``[out_features, in_features]``.
        bias: float32 ``[out_features]``, ``None`` for no bias.
        activation: ``identity``, ``tanh``, ``relu``, ``gelu`` (exact, by erf), ``sigmoid`` or
            ``silu``.
        residual: float32 ``[out_features, in_features]``, ``None`` for no such sum.
    """

    in_features: int
    out_features: int
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    activation: str
    residual: NDArray[np.float32] | None = None


def read_dense(folder: Path, vector: str = "sentence_embedding") -> DenseLayer:
    """Read the module ``sentence_transformers.models.Dense`` in ``folder``.

    Args:
        folder: the module's.
        vector: what it has to read and write, as sentence-transformers names it.

    Raises:
        CheckpointError: if a file is missing or damaged, the weights are pickled or do not have the
            shapes that the config says, or the layer does something other than :class:`DenseLayer`.
    """
    file = folder / "config.json"
    config = read_json_object(file)
    if unknown := sorted(set(config) - _KNOWN_KEYS):
        raise CheckpointError(
            f"{file}: Dense has settings that are not supported: {', '.join(unknown)}"
        )
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, vector):
            raise CheckpointError(
                f"{file}: Dense with {key}={config[key]!r} is not supported, only {vector!r}"
            )
    full_name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = (
        _ACTIVATIONS.get(full_name.rpartition(".")[2])
        if full_name.startswith("torch.nn.")
        else None
    )
    if activation is None:
        raise CheckpointError(
            f"{file}: the activation {full_name} is not supported; supported are torch.nn's "
            f"{', '.join(_ACTIVATIONS)}"
        )
    in_features, out_features = config.get("in_features"), config.get("out_features")
    if type(in_features) is not int or type(out_features) is not int:
        raise CheckpointError(f"{file}: expected whole numbers in_features and out_features")
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (out_features, in_features)}
    if config.get("bias", True):
        shapes["linear.bias"] = (out_features,)
    adds_input = bool(config.get("use_residual"))
    if adds_input and in_features != out_features:
        shapes["residual.weight"] = (out_features, in_features)
    files = weight_files(folder)
    found = {key: file.shape(key) for key, file in files.items()}
    if found != shapes:
        raise CheckpointError(f"{folder}: expected the tensors {shapes}, found {found}")
    return DenseLayer(
        in_features=in_features,
        out_features=out_features,
        weight=files["linear.weight"].read("linear.weight"),
        bias=files["linear.bias"].read("linear.bias") if "linear.bias" in shapes else None,
        activation=activation,
        residual=_residual(files, in_features) if adds_input else None,
    )


def linear_dense(folder: Path, name: str) -> DenseLayer:
    """The layer without bias and activation that a tensor of a model's own weights is.

    Args:
        folder: the model's.
        name: of the tensor.

    Raises:
        CheckpointError: there is no such matrix.
    """
    files = weight_files(folder)
    if name not in files or len(files[name].shape(name)) != 2:
        raise CheckpointError(
            f"{folder}: expected a matrix {name} among the weights, the Linear that makes vectors of token states, "
            "found none; fetch or save the model again"
        )
    weight = files[name].read(name)
    rows, columns = weight.shape
    return DenseLayer(
        in_features=columns, out_features=rows, weight=weight, bias=None, activation="identity"
    )


def _residual(files: Mapping[str, SafetensorsFile], width: int) -> NDArray[np.float32]:
    """The matrix that a layer's input is added through: the identity where widths agree."""
    file = files.get("residual.weight")
    return np.eye(width, dtype=np.float32) if file is None else file.read("residual.weight")
