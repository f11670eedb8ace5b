"""What sentence-transformers' files say about a model: how its tokens become one vector.

    modules.json                        the pipeline: Transformer, Pooling, then Dense and Normalize
    config_sentence_transformers.json   prompts, default prompt, similarity
    sentence_bert_config.json           maximum length, lower-casing (beside config.json)
    1_Pooling/config.json               the pooling, as one name or as the older flags
    2_Dense/                            a linear layer on the pooled vector

Only a pipeline that the graph reproduces exactly is accepted; every other module or setting is
refused by its name. Names and defaults follow sentence-transformers 5 and 6.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.export.source.card import read_tags
from embedge.export.source.checkpoint import inside_folder, transformer_folder
from embedge.export.source.dense import DenseLayer, read_dense
from embedge.export.source.json_files import read_json, read_json_object
from embedge.export.source.text_limits import (
    TOKENIZER_ARGUMENTS,
    max_length,
    read_optional,
    tokenizer_arguments,
)
from embedge.runtime.errors import EmbedgeWarning

__all__ = ["DenseLayer", "SentenceSettings", "read_modules"]

POOLINGS = ("mean", "cls", "lasttoken")
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLING_KEYS = frozenset(
    {"embedding_dimension", "include_prompt", "pooling_mode", "word_embedding_dimension"}
    | set(_POOLING_FLAGS)
)
_SIMILARITIES = {None: "cosine", "cosine": "cosine", "dot": "dot", "dot_product": "dot"}
_TRANSFORMER_CONFIGS = [
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]


@dataclass(frozen=True, kw_only=True)
class SentenceSettings:
    """How texts become vectors.

    Attributes:
        pooling: ``"mean"``, ``"cls"`` or ``"lasttoken"``; ``None`` where the model does not say.
        include_prompt: whether the tokens of a prompt are pooled like all others; false only where no
            prompt is declared, and calls may give none.
        normalize: whether vectors are scaled to length 1 at the end.
        dense: layers between pooling and normalization, in order.
        prompts: prompt name to text; a text may be empty.
        default_prompt_name: the prompt used when none is named, ``None`` for no prompt.
        max_length: the most tokens of a text, special tokens included.
        similarity: ``"cosine"`` or ``"dot"``.
        truncate_dim: the dimension that vectors are cut to after all modules, ``None`` for all of
            it.
        matryoshka_dims: dimensions it was trained to be cut to, where it declares them.
        task_prompts: prompts of the tasks that have others than ``prompts``.
        task_defaults: names of their default prompts.
        tokenizer_settings: what takes the place of settings in tokenizer_config.json.
        lowercase: whether texts are lower-cased before anything else.
    """

    pooling: str | None
    include_prompt: bool = True
    normalize: bool = False
    dense: tuple[DenseLayer, ...] = ()
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    max_length: int
    similarity: str = "cosine"
    truncate_dim: int | None = None
    matryoshka_dims: tuple[int, ...] = ()
    task_prompts: dict[str, dict[str, str]] = field(default_factory=dict)
    task_defaults: dict[str, str | None] = field(default_factory=dict)
    tokenizer_settings: dict[str, Any] = field(default_factory=dict)
    lowercase: bool = False


def read_modules(path: Path, config: dict[str, Any]) -> SentenceSettings:
    """Read the sentence-transformers files of the model folder ``path``.

    A folder without them gives the settings of a bare transformer: no pooling (the caller has to
    name one), no normalization, no prompts.

    Args:
        path: the model folder, :attr:`Checkpoint.path`.
        config: the transformer's config.json, :attr:`Checkpoint.config`.

    Raises:
        CheckpointError: if a file is missing or damaged, or names something that is not supported.
    """
    folder = transformer_folder(path)
    transformer = _read_transformer(folder)
    if not (path / "modules.json").is_file():
        _check_purpose(path, config)
    settings = _read_settings(path / "config_sentence_transformers.json")
    prompts, default_prompt_name = settings["prompts"], settings["default_prompt_name"]
    pooling, include_prompt, dense, normalize = None, True, [], False
    for kind, module_folder in _pipeline(path):
        if kind == "Pooling":
            pooling, include_prompt = _read_pooling(
                module_folder / "config.json", has_prompts=any(prompts.values())
            )
        elif kind == "Dense":
            dense.append(read_dense(module_folder))
        elif kind == "Normalize":
            _check_normalize(module_folder / "config.json")
            normalize = True
    return SentenceSettings(
        pooling=pooling,
        include_prompt=include_prompt,
        normalize=normalize,
        dense=tuple(dense),
        prompts=prompts,
        default_prompt_name=default_prompt_name,
        max_length=max_length(folder, config, transformer),
        similarity=settings["similarity"],
        truncate_dim=settings["truncate_dim"],
        matryoshka_dims=_matryoshka_dims(folder / "config.json", config),
        tokenizer_settings={
            key: value
            for key, value in tokenizer_arguments(transformer).items()
            if key not in _LOADING
        },
        lowercase=bool(transformer.get("do_lower_case")),
    )


def _matryoshka_dims(file: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """The ``matryoshka_dims`` of config.json, where jina-embeddings-v4 has them."""
    dims = config.get("matryoshka_dims") or []
    if not isinstance(dims, list) or not all(type(dim) is int for dim in dims):
        raise CheckpointError(
            f"{file}: matryoshka_dims is {dims!r}, expected a list of whole numbers"
        )
    return tuple(dims)


def _pipeline(path: Path) -> list[tuple[str, Path]]:
    """Return kind and folder of the modules after the transformer, in the one supported order."""
    file = path / "modules.json"
    if not os.path.lexists(file):
        return []
    modules = read_json(file, CheckpointError)
    names = [str(module.get("type")) for module in modules]
    kinds = [_kind(name, file) for name in names]
    order = {"Transformer": 0, "Pooling": 1, "Dense": 2, "Normalize": 3}
    ranks = [
        order[kind] for kind in kinds if kind != "Dropout"
    ]  # Dropout does nothing once trained
    if ranks != sorted(ranks) or ranks[:1] != [0] or [ranks.count(0), ranks.count(1)] != [1, 1]:
        raise CheckpointError(
            f"{file}: the modules {' → '.join(kinds)} are not supported in this order; expected "
            "Transformer → Pooling → Dense … → Normalize, the last two where wanted"
        )
    folders = [path / inside_folder(str(module.get("path") or ""), file) for module in modules]
    return list(zip(kinds[1:], folders[1:], strict=True))


def _kind(name: str, file: Path) -> str:
    kind = name.rpartition(".")[2]
    supported = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")
    if not name.startswith("sentence_transformers.") or kind not in supported:
        raise CheckpointError(
            f"{file}: the module {name} is not supported; supported are sentence_transformers' "
            f"{', '.join(supported)}"
        )
    return kind


def _read_pooling(file: Path, *, has_prompts: bool) -> tuple[str, bool]:
    """The pooling, and whether it takes a prompt's tokens; the last token is never a prompt's."""
    config = read_json_object(file, CheckpointError)
    if unknown := sorted(set(config) - _POOLING_KEYS):
        raise CheckpointError(
            f"{file}: Pooling has settings that sentence-transformers does not know: {', '.join(unknown)}; "
            "delete them if no vector depends on them, otherwise the model cannot be exported yet"
        )
    modes = config.get("pooling_mode")
    if "pooling_mode" not in config:
        modes = [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    modes = list(modes) if isinstance(modes, list) else [modes]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise CheckpointError(
            f"{file}: the pooling {' + '.join(map(str, modes))} is not supported; supported is one "
            f"of {', '.join(POOLINGS)}"
        )
    include_prompt = bool(config.get("include_prompt", True)) or modes[0] == "lasttoken"
    if has_prompts and not include_prompt:
        raise CheckpointError(
            f"{file}: include_prompt=false (prompts are left out of the pooling) is not supported "
            "for a model with prompts"
        )
    return str(modes[0]), include_prompt


def _check_normalize(file: Path) -> None:
    for key, value in read_optional(file).items():
        if key in ("module_input_name", "module_output_name") and value not in (
            None,
            "sentence_embedding",
        ):
            raise CheckpointError(
                f"{file}: Normalize with {key}={value!r} is not supported, only "
                "'sentence_embedding'"
            )


def _read_settings(file: Path) -> dict[str, Any]:
    """Return what config_sentence_transformers.json says, under the names of the settings."""
    config = read_optional(file)
    model_type = config.get("model_type", "SentenceTransformer")
    if model_type != "SentenceTransformer":
        raise CheckpointError(
            f"{file}: a {model_type} model is not supported, only SentenceTransformer"
        )
    similarity = config.get("similarity_fn_name")
    if not isinstance(similarity, str | None) or similarity not in _SIMILARITIES:
        raise CheckpointError(
            f"{file}: the similarity {similarity!r} is not supported; supported are cosine and dot"
        )
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        text is None or isinstance(text, str) for text in prompts.values()
    ):
        raise CheckpointError(f"{file}: prompts should map names to texts, found {prompts!r}")
    prompts = {name: text or "" for name, text in prompts.items()}
    default = config.get("default_prompt_name")
    if default is not None and default not in list(prompts):
        raise CheckpointError(
            f"{file}: default_prompt_name is {default!r}, the prompts are: "
            f"{', '.join(prompts) or 'none'}"
        )
    truncate_dim = config.get("truncate_dim")
    if truncate_dim is not None and (type(truncate_dim) is not int or truncate_dim < 1):
        raise CheckpointError(
            f"{file}: truncate_dim is {truncate_dim!r}, expected a positive whole number or null"
        )
    return {
        "prompts": prompts,
        "default_prompt_name": default,
        "similarity": _SIMILARITIES[similarity],
        "truncate_dim": truncate_dim,
    }


def _read_transformer(folder: Path) -> dict[str, Any]:
    """Return sentence_bert_config.json or an older name of it; refuse what changes the tokens."""
    file = next(
        (folder / n for n in _TRANSFORMER_CONFIGS if os.path.lexists(folder / n)),
        folder / _TRANSFORMER_CONFIGS[0],
    )
    config = read_optional(file)
    task = config.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise CheckpointError(
            f"{file}: transformer_task={task!r} is not supported, only 'feature-extraction'"
        )
    modalities = config.get("modality_config")
    if modalities is not None:
        text = modalities.get("text") if isinstance(modalities, dict) else None
        text = text if isinstance(text, dict) else {}
        if text.get("method") != "forward" or text.get("method_output_name") != "last_hidden_state":
            raise CheckpointError(
                f"{file}: modality_config reads {text or 'no text'}; supported is text by the "
                "method 'forward' with the output 'last_hidden_state'"
            )
        if config.get("module_output_name") != "token_embeddings":
            raise CheckpointError(
                f"{file}: module_output_name is {config.get('module_output_name')!r}, expected "
                "'token_embeddings', which Pooling reads"
            )
        if "message" in modalities:
            raise CheckpointError(
                f"{file}: modality_config has 'message': sentence-transformers puts each text into the "
                "tokenizer's chat template, which is not supported; expected 'text' alone. Delete 'message' "
                "there if the model was trained on texts without the template"
            )
    for key, value in config.items():
        _check_argument(file, key, value)
    return config


_MODEL_ARGUMENTS = ("model_args", "model_kwargs", "config_args", "config_kwargs")
_KNOWN = frozenset(
    {"do_lower_case", "max_seq_length", "modality_config", "module_output_name", "transformer_task"}
    | {"unpad_inputs", "backend", *TOKENIZER_ARGUMENTS}
)
# How a model is loaded, not what it computes.
_LOADING = frozenset(
    {
        "add_pooling_layer",
        "attn_implementation",
        "cache_dir",
        "device_map",
        "dtype",
        "local_files_only",
    }
    | {
        "low_cpu_mem_usage",
        "revision",
        "token",
        "torch_dtype",
        "trust_remote_code",
        "use_safetensors",
    }
)


def _check_argument(file: Path, key: str, value: Any) -> None:
    """Refuse an argument of sentence-transformers' Transformer that is neither used nor harmless."""
    if key in TOKENIZER_ARGUMENTS and value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{file}: {key} is {value!r}, expected an object of settings")
    if key in _KNOWN or value in (None, {}, False):
        return
    if key in _MODEL_ARGUMENTS and isinstance(value, dict):
        if unknown := sorted(set(value) - _LOADING):
            raise CheckpointError(
                f"{file}: {key} has {', '.join(f'{k}={value[k]!r}' for k in unknown)}, which may change "
                "the vector; expected only how the model is loaded. Write it into config.json instead, "
                "where it is checked, and delete it here"
            )
        return
    raise CheckpointError(
        f"{file}: {key}={value!r} is not supported; delete it if no vector depends on it, otherwise the "
        "model cannot be exported yet"
    )


def _check_purpose(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a folder without modules whose files say that its output is a head's; warn of a head."""
    marks = config.get("sentence_transformers")
    if (isinstance(marks, dict) and "activation_fn" in marks) or (
        "sbert_ce_default_activation_function" in config
    ):
        raise CheckpointError(
            f"{path / 'config.json'}: names the activation of a cross-encoder, whose output is a score of "
            "two texts; expected a model that embeds one"
        )
    for tag in read_tags(path):
        if tag in _OTHER_PURPOSES:
            raise CheckpointError(
                f"{path / 'README.md'}: the tag {tag} says that this is {_OTHER_PURPOSES[tag]}; expected "
                "a model whose vector is pooled from token states. If it is one, add modules.json as "
                "sentence-transformers writes it"
            )
    for name in config.get("architectures") or ():
        if str(name).endswith(("ForMaskedLM", "ForSequenceClassification")):
            warnings.warn(
                f"{path / 'config.json'}: names {name} and there is no modules.json: its head is left out. "
                "A model whose output is the head's, as SPLADE's or a cross-encoder's, is another then",
                EmbedgeWarning,
                stacklevel=5,
            )


_OTHER_PURPOSES = {
    "colbert": "a late-interaction model",
    "cross-encoder": "a cross-encoder, which scores two texts",
    "reranker": "a cross-encoder, which scores two texts",
    "sparse-encoder": "a sparse encoder, whose output is its language head's",
    "splade": "a sparse encoder, whose output is its language head's",
    "text-ranking": "a cross-encoder, which scores two texts",
}
