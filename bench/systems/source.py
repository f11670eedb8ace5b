"""How a source model turns tokens into one vector, read from its sentence-transformers files.

The exporter has a reader of its own for the same files. This one shares no line with it on purpose:
a reference that used the exporter's reader would repeat its mistakes and find none of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from embedge.bench.errors import BenchArgumentError, BenchError
from embedge.runtime.bundle.manifest import BaseQuantization

__all__ = [
    "DenseModule",
    "Source",
    "is_jina_v4",
    "model_folder",
    "read_multi_vector_source",
    "read_source",
    "source_of_task",
]

_POOLING_FLAGS = {  # in the order in which vectors of several are concatenated
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ROLE_PROMPTS: dict[str | None, tuple[str | None, ...]] = {
    None: (),
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}
_ACTIVATIONS: dict[str, type[torch.nn.Module]] = {
    cls.__name__: cls
    for cls in (
        torch.nn.GELU,
        torch.nn.Identity,
        torch.nn.ReLU,
        torch.nn.Sigmoid,
        torch.nn.SiLU,
        torch.nn.Tanh,
    )
}


@dataclass(frozen=True, kw_only=True)
class DenseModule:
    """A linear layer on the pooled vector.

    Attributes:
        weight: float32 ``[out, in]``.
        bias: float32 ``[out]``, ``None`` for no bias.
        activation: applied to the result.
        residual: float32 ``[out, in]`` whose product with the input is added then, or ``None``.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: torch.nn.Module
    residual: torch.Tensor | None = None

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for float32 ``[n, in]``."""
        result: torch.Tensor = self.activation(
            torch.nn.functional.linear(vectors, self.weight, self.bias)
        )
        return result if self.residual is None else result + vectors @ self.residual.T


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model folder and what its files say beyond the transformer itself.

    Attributes:
        path: the model's folder.
        transformer: the folder with config.json, weights and tokenizer.
        pooling: ``"mean"`` or another of sentence-transformers', or several joined by ``"+"``; ``"none"`` of a
            late-interaction model.
        normalize: whether vectors end with length 1.
        dense: layers between pooling and normalization.
        max_length: the most tokens of a text, special tokens included; ``None`` when only the
            tokenizer knows.
        prompts: prompt name to text.
        default_prompt_name: the prompt when none is named, ``None`` for no prompt.
        include_prompt: whether the tokens of a prompt are pooled like all others.
        base_quantization: how its Linears were quantized when adapters were trained, ``None``: they were not.
    """

    path: Path
    transformer: Path
    pooling: str
    normalize: bool = False
    dense: tuple[DenseModule, ...] = ()
    max_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    include_prompt: bool = True
    base_quantization: BaseQuantization | None = None

    def prompt(self, role: str | None = None) -> str:
        """Return the text put before a text of a role.

        Args:
            role: ``"query"``: the prompt of that name, else the default; ``"document"``: the prompt
                ``document``, ``passage`` or ``corpus``, else nothing; ``None``: the default, else nothing.
        """
        names = _ROLE_PROMPTS[role] + (() if role == "document" else (self.default_prompt_name,))
        return next((self.prompts[name] for name in names if name in self.prompts), "")


def read_source(source: str | Path, pooling: str | None = None) -> Source:
    """Read the folder ``source``, or the hub id's snapshot.

    Args:
        source: a model folder, or a hub id where there is a hub or a cache of it.
        pooling: overrides the files; needed where they name none.

    Raises:
        BenchError: no such model, or its files ask for something the reference does not do.
    """
    path = model_folder(source)
    return _source(path, pooling)


def read_multi_vector_source(source: str | Path) -> Source:
    """Read where a late-interaction model's transformer lies; its rules are left to sentence-transformers.

    Args:
        source: a model folder, or a hub id where there is a hub or a cache of it.

    Returns:
        The source, with the pooling ``"none"``.

    Raises:
        BenchError: no such model.
    """
    path = model_folder(source)
    modules = _read(path / "modules.json", default=[])
    inner = next((m["path"] for m in modules if str(m["type"]).endswith(".Transformer")), "")
    return Source(path=path, transformer=path / inner, pooling="none")


def source_of_task(source: Source, adapter: str | Path | None, task: str | None = None) -> Source:
    """The source as a task has it: with the modules that sentence-transformers saved beside its adapter.

    Args:
        source: the base model.
        adapter: the folder of ``adapter_config.json``; ``None`` is the bare model.
        task: whose it is; jina-embeddings-v4 has passages of text-matching under a query's prompt.

    Raises:
        BenchError: the folder's files ask for something the reference does not do.
    """
    if task == "text-matching" and is_jina_v4(source.transformer):
        return replace(source, prompts=dict.fromkeys(source.prompts, "Query: "))
    if adapter is None or not (Path(adapter) / "modules.json").is_file():
        return source
    own = _source(Path(adapter), None)
    return replace(
        own,
        path=source.path,
        transformer=source.transformer,
        base_quantization=source.base_quantization,
    )


def _source(path: Path, pooling: str | None) -> Source:
    modules = _read(path / "modules.json", default=[])
    kinds = {str(module["type"]).rpartition(".")[2]: module.get("path", "") for module in modules}
    transformer = path / kinds.get("Transformer", "")
    include_prompt = True
    if "Pooling" in kinds:
        file = path / kinds["Pooling"] / "config.json"
        pooling = pooling or _pooling(file)
        include_prompt = _read(file).get("include_prompt", True) is not False
    if is_jina_v4(transformer):
        return _jina_v4_source(path, transformer, pooling)
    own = _own_rule(transformer, modules)
    if own is not None:
        pooling = pooling or own
    if pooling is None or not set(pooling.split("+")) <= set(_POOLING_FLAGS.values()):
        raise BenchError(
            f"{path}: the pooling is {pooling or 'not named by any file'}; expected one of "
            f"{', '.join(_POOLING_FLAGS.values())}; name one with --pooling"
        )
    dense = [m.get("path", "") for m in modules if str(m["type"]).endswith(".Dense")]
    settings = _read(path / "config_sentence_transformers.json", default={})
    limits = _read(transformer / "sentence_bert_config.json", default={})
    return Source(
        path=path,
        transformer=transformer,
        pooling=pooling,
        normalize="Normalize" in kinds or own is not None,
        dense=tuple(_dense(path / folder) for folder in dense),
        max_length=limits.get("max_seq_length"),
        prompts={name: text or "" for name, text in (settings.get("prompts") or {}).items()},
        default_prompt_name=settings.get("default_prompt_name"),
        include_prompt=include_prompt,
    )


def is_jina_v4(transformer: Path) -> bool:
    """Return whether a folder has jina-embeddings-v4's config.json, which names no model_type."""
    config = _read(transformer / "config.json", default={})
    return "JinaEmbeddingsV4Model" in (config.get("architectures") or ())


def _jina_v4_source(path: Path, transformer: Path, pooling: str | None) -> Source:
    """The rules that jina-embeddings-v4's own code has: means of length 1, a query's prompt where none is named."""
    strategy = _read(transformer / "config.json").get("single_vector_pool_strategy", "mean")
    if "mean" not in (pooling or strategy):
        raise BenchError(f"{path}: the pooling is {pooling or strategy}; expected mean")
    return Source(
        path=path,
        transformer=transformer,
        pooling="mean",
        normalize=True,
        max_length=32768,
        prompts={"query": "Query: ", "passage": "Passage: "},
        default_prompt_name="query",
    )


def _own_rule(transformer: Path, modules: list[dict[str, Any]]) -> str | None:
    """The pooling of models whose one module is code of their own, which ends with length 1.

    jina-embeddings-v5-text takes the last token of the mask.
    """
    kind = _read(transformer / "config.json", default={}).get("model_type")
    names = [str(module.get("type")) for module in modules]
    return (
        "lasttoken" if (kind, names) == ("jina_embeddings_v5", ["custom_st.Transformer"]) else None
    )


def model_folder(source: str | Path) -> Path:
    """Return the folder ``source``, or the hub id's snapshot.

    Raises:
        BenchError: no such model.
    """
    path = Path(source)
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or str(source).count("/") > 1:
        raise BenchArgumentError(f"--reference {source}: no such folder")
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(str(source)))
    except Exception as error:  # the hub's own errors have no common base
        if constants.HF_HUB_OFFLINE:
            reason = "in the hub's cache, and HF_HUB_OFFLINE is set: unset it, or name a folder"
        else:
            reason = f"a model that the hub gave: {error}; check the name and the network"
        raise BenchArgumentError(f"--reference {source}: neither a folder nor {reason}") from error


def _pooling(file: Path) -> str:
    config = _read(file)
    named = config.get("pooling_mode")
    modes = [named] if isinstance(named, str) else list(named or [])
    modes = modes or [name for flag, name in _POOLING_FLAGS.items() if config.get(flag)]
    if not modes:
        raise BenchError(f"{file}: expected a pooling, found none")
    return "+".join(map(str, modes))


def _dense(folder: Path) -> DenseModule:
    config = _read(folder / "config.json")
    name = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise BenchError(
            f"{folder / 'config.json'}: the activation {name} is not known to the reference; "
            f"known are {', '.join(_ACTIVATIONS)}"
        )
    weights = folder / "model.safetensors"
    if weights.is_file():
        tensors = load_file(weights)
    else:
        tensors = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    bias = tensors.get("linear.bias")
    residual = None
    if config.get("use_residual"):
        width = tensors["linear.weight"].shape[1]
        residual = tensors.get("residual.weight", torch.eye(width)).float()
    return DenseModule(
        weight=tensors["linear.weight"].float(),
        bias=None if bias is None else bias.float(),
        activation=_ACTIVATIONS[name](),
        residual=residual,
    )


def _read(file: Path, default: Any = None) -> Any:
    if default is not None and not file.is_file():
        return default
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{file}: expected a JSON file, found {error}") from error
