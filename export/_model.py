"""The model behind an export: checkpoint, family, sentence-transformers settings and bound adapters."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

from embedge.export._adapters import Adapter, BoundAdapter
from embedge.export._assemble import task_graph
from embedge.export._checkpoint import Checkpoint
from embedge.export._errors import AdapterError, CheckpointError
from embedge.export._forms import Form
from embedge.export._graph import BASE, Graph
from embedge.export._request import POOLINGS, Request
from embedge.export._sentence_transformers import SentenceSettings, read_modules
from embedge.export._tokenizer import BundleTokenizer, read_tokenizer
from embedge.export._weights import TaskWeights
from embedge.export.families import Family, family_of
from embedge.runtime._errors import EmbedgeValueError, EmbedgeWarning


@dataclass(frozen=True, kw_only=True)
class Model:
    """Everything that is read before anything is written.

    Attributes:
        pooling: how token states become a vector.
        tasks: the tensors of every requested task.
        adapters: the adapter of every requested task, ``None`` for the bare backbone.
        base: the backbone's own tensors.
    """

    checkpoint: Checkpoint
    family: Family
    settings: SentenceSettings
    pooling: str
    tokenizer: BundleTokenizer
    adapters: dict[str, BoundAdapter | None]
    tasks: dict[str, TaskWeights]
    base: TaskWeights

    @property
    def dim(self) -> int:
        """Length of a vector."""
        dense = self.settings.dense
        return dense[-1].out_features if dense else self.family.hidden_size

    def graph(self, weights: TaskWeights, form: Form) -> Graph:
        """The graph of a task at a precision."""
        return task_graph(
            self.family,
            weights,
            form,
            pooling=self.pooling,
            dense=self.settings.dense,
            normalize=self.settings.normalize,
        )


def read_model(request: Request) -> Model:
    """Open the model, bind all adapters, and write every graph once without its weights.

    Raises:
        CheckpointError: the model cannot be exported.
        AdapterError: an adapter does not fit, or changes what no vector depends on.
    """
    checkpoint = Checkpoint.open(request.source)
    family_class = family_of(checkpoint.config)
    settings = read_modules(checkpoint.path, checkpoint.config)
    pooling = request.pooling or settings.pooling or family_class.default_pooling
    if pooling not in POOLINGS:
        raise EmbedgeValueError(
            f"{checkpoint.name}: the model does not say how tokens become a vector, and pooling is "
            f"{pooling!r}; expected one of {', '.join(POOLINGS)}: give pooling= (--pooling)"
        )
    if request.pooling and settings.pooling and request.pooling != settings.pooling:
        warnings.warn(
            f"{checkpoint.name}: pooling {request.pooling!r} was asked for, its files say "
            f"{settings.pooling!r}; the request is followed",
            EmbedgeWarning,
            stacklevel=3,
        )
    if settings.truncate_dim is not None:
        warnings.warn(
            f"{checkpoint.name}: truncate_dim={settings.truncate_dim} of its files is not built into "
            "the graph; pass truncate_dim= to encode",
            EmbedgeWarning,
            stacklevel=3,
        )
        settings = replace(settings, truncate_dim=None)
    family = family_class(checkpoint.config, settings.max_length)
    adapters: dict[str, BoundAdapter | None] = {}
    tasks: dict[str, TaskWeights] = {}
    for task, folder in request.adapters.items():
        bound = None
        if folder is not None:
            bound = Adapter.load(folder, task).bind(checkpoint, family_class.canonical)
        adapters[task] = bound
        tasks[task] = TaskWeights(checkpoint, family_class, bound, task)
    model = Model(
        checkpoint=checkpoint,
        family=family,
        settings=settings,
        pooling=pooling,
        tokenizer=read_tokenizer(checkpoint.transformer_path),
        adapters=adapters,
        tasks=tasks,
        base=TaskWeights(checkpoint, family_class),
    )
    for task, weights in {BASE: model.base, **tasks}.items():
        model.graph(weights, Form())  # asks for every tensor by name and shape
        _check_all_read(model, task, weights)
    return model


def _check_all_read(model: Model, task: str, weights: TaskWeights) -> None:
    changed, others = weights.unread()
    if changed:
        raise AdapterError(
            f"adapter of task {task}: expected every adapted tensor to reach the vector, but these "
            f"do not: {', '.join(changed)}; remove them from the adapter"
        )
    ignored = model.family.ignored
    left = [n for n in others if not n.startswith(ignored) and not n.endswith(".inv_freq")]
    if left and task == BASE:
        shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
        raise CheckpointError(
            f"{model.checkpoint.path}: expected only tensors of a {model.family.config['model_type']} "
            f"backbone, found {shown}; the architecture differs from what its config.json says"
        )
