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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.export.source.card import ModelCard
from embedge.export.source.dense import DenseLayer, linear_dense, read_dense
from embedge.export.source.json_files import read_json_object, read_optional
from embedge.export.source.late_interaction import (
    LINEAR,
    METADATA,
    LateInteraction,
    is_late,
    is_stanford,
    prefixed,
    read_late,
    read_stanford,
    token_similarity,
)
from embedge.export.source.modules import module_names, pipeline
from embedge.export.source.purpose import check_purpose
from embedge.export.source.text_limits import max_length
from embedge.export.source.transformer_settings import (
    read_transformer_settings,
    tokenizer_arguments,
    transformer_file,
)

__all__ = ["POOLINGS", "SentenceSettings", "pooling_problem", "read_modules"]

POOLINGS = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean")
_TOKENS = "token_embeddings"
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


@dataclass(frozen=True, kw_only=True)
class SentenceSettings:
    """How texts become vectors.

    Attributes:
        pooling: one of :data:`POOLINGS`, or several joined by ``"+"``, whose vectors are concatenated;
            ``None`` where the model does not say.
        include_prompt: whether the tokens of a prompt are pooled like all others, which INSTRUCTOR's
            models do not.
        normalize: whether vectors are scaled to length 1 at the end.
        tanh_int8: whether vectors end as round(127 · tanh(x)), whole numbers from -127 to 127.
        dense: layers between pooling and normalization, in order.
        prompts: prompt name to text; a text may be empty.
        default_prompt_name: the prompt used when none is named, ``None`` for no prompt.
        max_length: the most tokens of a text, special tokens included.
        similarity: ``"cosine"`` or ``"dot"``; with ``late`` ``"maxsim"`` or ``"meanmaxsim"``.
        truncate_dim: the dimension that vectors are cut to after all modules, ``None`` for all of
            it.
        matryoshka_dims: dimensions it was trained to be cut to, where it declares them.
        task_prompts: prompts of the tasks that have others than ``prompts``.
        task_defaults: names of their default prompts.
        tokenizer_settings: what takes the place of settings in tokenizer_config.json.
        lowercase: whether texts are lower-cased before anything else.
        late: how queries and documents become vectors of tokens, of which a text has no single one;
            ``None`` for models that pool.
    """

    pooling: str | None = None
    include_prompt: bool = True
    normalize: bool = False
    tanh_int8: bool = False
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
    late: LateInteraction | None = None


def read_modules(
    path: Path, config: Mapping[str, Any], card: ModelCard | None = None
) -> SentenceSettings:
    """Read the sentence-transformers files of the model folder ``path``.

    A folder without them gives the settings of a bare transformer: no pooling (the caller has to
    name one), no normalization, no prompts.

    Args:
        path: the model folder, :attr:`Checkpoint.path`.
        config: the transformer's config.json, :attr:`Checkpoint.config`.
        card: its model card, which counts where there is no modules.json.

    Raises:
        CheckpointError: if a file is missing or damaged, or names something that is not supported.
    """
    file = path / "config_sentence_transformers.json"
    late = is_late(read_optional(file), module_names(path))
    modules = pipeline(path, str(config.get("model_type")), late=late)
    folder = modules[0][1] if modules else path
    transformer = read_transformer_settings(folder, late=late)
    if not modules and is_stanford(config):
        return _read_stanford(path, config, transformer)
    if not modules:
        check_purpose(path, config, card.tags if card else ())
    settings = _read_settings(file, late=late)
    if late:
        return _read_late(path, config, modules, transformer, settings)
    is_jina_v5 = bool(modules) and modules[0][0] == "JinaV5"
    if is_jina_v5:
        settings |= {"pooling": "lasttoken", "normalize": True}
    dense = []
    for kind, module_folder in modules[1:]:
        file = module_folder / "config.json"
        if kind == "Pooling":
            settings |= _read_pooling(file)
        elif kind == "Dense":
            dense.append(read_dense(module_folder))
        elif kind == "Normalize":
            _check_normalize(file)
            settings["normalize"] = True
        elif kind == "FlexibleQuantizer":  # calls here ask for none of its other forms
            settings["tanh_int8"] = True
    return SentenceSettings(
        **settings,
        dense=tuple(dense),
        max_length=max_length(folder, config, transformer, by_tokenizer=not is_jina_v5),
        matryoshka_dims=_matryoshka_dims(folder / "config.json", config),
        tokenizer_settings=tokenizer_arguments(transformer),
        lowercase=bool(transformer.get("do_lower_case")),
    )


def _read_late(
    path: Path,
    config: Mapping[str, Any],
    modules: Sequence[tuple[str, Path]],
    transformer: Mapping[str, Any],
    settings: dict[str, Any],
) -> SentenceSettings:
    """The settings of a late-interaction model.

    Args:
        path: the model folder.
        config: the transformer's config.json.
        modules: kind and folder of each.
        transformer: sentence_bert_config.json.
        settings: what config_sentence_transformers.json says.
    """
    file = path / "config_sentence_transformers.json"
    if not modules:
        raise CheckpointError(
            f"{file}: names a late-interaction model, and there is no modules.json that says how token states "
            "become its vectors; fetch or save the model again"
        )
    folder, folders = modules[0][1], dict(modules)
    if "Normalize" in folders:
        _check_normalize(
            folders["Normalize"] / "config.json", _TOKENS, default="sentence_embedding"
        )
    late = read_late(
        file,
        transformer_file(folder),
        transformer,
        folders.get("MultiVectorMask"),
        max_length(folder, config, transformer),
    )
    truncate_dim = settings.pop("truncate_dim")
    if truncate_dim is not None:
        raise CheckpointError(
            f"{file}: truncate_dim is {truncate_dim}, expected null: vectors of tokens are not cut"
        )
    pylate = read_optional(file).get("model_type") != "MultiVectorEncoder"
    return SentenceSettings(
        **settings,
        normalize="Normalize" in folders or pylate,
        dense=tuple(read_dense(f, _TOKENS) for kind, f in modules if kind == "Dense"),
        max_length=late.longest,
        tokenizer_settings=tokenizer_arguments(transformer),
        lowercase=bool(transformer.get("do_lower_case")),
        late=late,
    )


def _read_stanford(
    path: Path, config: Mapping[str, Any], transformer: Mapping[str, Any]
) -> SentenceSettings:
    """The settings of Stanford's ColBERT; its arguments are those of :func:`_read_late`."""
    late = read_stanford(path / METADATA, max_length(path, config, transformer))
    query, document = late.markers
    return SentenceSettings(
        normalize=True,
        dense=(linear_dense(path, LINEAR),),
        prompts={"query": query, "document": document},
        max_length=late.longest,
        similarity="maxsim",
        tokenizer_settings=tokenizer_arguments(transformer),
        lowercase=bool(transformer.get("do_lower_case")),
        late=late,
    )


def _matryoshka_dims(file: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The dimensions that config.json names, as jina-embeddings v4 and v3 and snowflake-arctic-embed have them."""
    dims = config.get("matryoshka_dims") or config.get("matryoshka_dimensions") or []
    if not isinstance(dims, list) or not all(type(dim) is int for dim in dims):
        raise CheckpointError(
            f"{file}: matryoshka_dims is {dims!r}, expected a list of whole numbers"
        )
    return tuple(dims)


def pooling_problem(pooling: object) -> str | None:
    """What is wrong with a pooling's name, or with several joined by "+"; ``None`` for nothing."""
    names = pooling.split("+") if isinstance(pooling, str) else []
    if not names or not set(names) <= set(POOLINGS) or len(set(names)) < len(names):
        return f"expected one of {', '.join(POOLINGS)}, or several joined by +, each once"
    return None


def _read_pooling(file: Path) -> dict[str, Any]:
    """The pooling, and whether it takes a prompt's tokens."""
    config = read_json_object(file)
    if unknown := sorted(set(config) - _POOLING_KEYS):
        raise CheckpointError(
            f"{file}: Pooling has settings that sentence-transformers does not know: {', '.join(unknown)}; "
            "delete them if no vector depends on them, otherwise the model cannot be exported yet"
        )
    modes = config.get("pooling_mode")
    if "pooling_mode" not in config:
        modes = [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    pooling = "+".join(map(str, modes)) if isinstance(modes, list) else str(modes)
    if problem := pooling_problem(pooling):
        raise CheckpointError(f"{file}: the pooling {pooling or modes} is not supported; {problem}")
    return {"pooling": pooling, "include_prompt": bool(config.get("include_prompt", True))}


def _check_normalize(
    file: Path, vector: str = "sentence_embedding", default: str | None = None
) -> None:
    """Refuse a normalization of something else.

    Args:
        file: the module's config.json, which may be missing.
        vector: what it has to normalize, as sentence-transformers names it.
        default: what it normalizes where the file does not say; ``None``: ``vector``.
    """
    config = {"module_input_name": default, **read_optional(file)}
    for key, value in config.items():
        if key in ("module_input_name", "module_output_name") and value not in (None, vector):
            raise CheckpointError(
                f"{file}: Normalize with {key}={value!r} is not supported, only {vector!r}"
            )


def _read_settings(file: Path, *, late: bool) -> dict[str, Any]:
    """What config_sentence_transformers.json says, under the names of :class:`SentenceSettings`."""
    config = read_optional(file)
    model_type = config.get("model_type", "SentenceTransformer")
    if model_type != "SentenceTransformer" and not late:
        raise CheckpointError(
            f"{file}: a {model_type} model is not supported, only SentenceTransformer, MultiVectorEncoder and "
            "ColBERT"
        )
    similarity = config.get("similarity_fn_name")
    if not late and (not isinstance(similarity, str | None) or similarity not in _SIMILARITIES):
        raise CheckpointError(
            f"{file}: the similarity {similarity!r} is not supported; supported are cosine and dot"
        )
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        text is None or isinstance(text, str) for text in prompts.values()
    ):
        raise CheckpointError(f"{file}: prompts should map names to texts, found {prompts!r}")
    prompts = {name: text or "" for name, text in prompts.items()}
    if late:
        prompts = prefixed(prompts, config, file)
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
        "similarity": token_similarity(similarity, file) if late else _SIMILARITIES[similarity],
        "truncate_dim": truncate_dim,
    }
