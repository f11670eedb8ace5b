"""The model behind an export: checkpoint, family, sentence-transformers settings and bound adapters."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from embedge.export.adapters.adapter import BoundAdapter
from embedge.export.families import Family
from embedge.export.families.base import Tower
from embedge.export.graph.architecture import Architecture
from embedge.export.graph.builder import Graph
from embedge.export.graph.initializers import digest
from embedge.export.graph.onnx_model import to_model
from embedge.export.graph.pooling import poolings
from embedge.export.graph.scheme import Scheme
from embedge.export.graph.task_graph import task_graph
from embedge.export.schemes.floats import Float32Scheme
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.fingerprint import dense_sha256
from embedge.export.source.sentence_transformers import SentenceSettings
from embedge.export.source.tokenizer import BundleTokenizer
from embedge.export.weights.rotated import RotatedWeights
from embedge.export.weights.task import TaskWeights
from embedge.export.weights.tensors import BASE, Weights
from embedge.runtime.bundle.licences import described_licences


@dataclass(frozen=True, kw_only=True)
class Model:
    """Everything that is read before anything is written.

    Attributes:
        family: what config.json says.
        architecture: the family's, with the inputs for images where there is a tower.
        tower: the vision tower, ``None`` where the export is for texts alone.
        image: what the manifest says about images.
        pooling: how token states become a vector, ``None`` with late interaction, where there is none.
        late_interaction: what the manifest says of queries and documents, ``None`` for models that pool.
        tasks: the tensors of every requested task.
        adapters: the adapter of every requested task, ``None`` for the bare backbone.
        base: the backbone's own tensors.
    """

    checkpoint: Checkpoint
    family: Family
    architecture: Architecture
    tower: Tower | None
    image: dict[str, Any] | None
    settings: SentenceSettings
    pooling: str | None
    tokenizer: BundleTokenizer
    adapters: dict[str, BoundAdapter | None]
    tasks: dict[str, TaskWeights]
    base: TaskWeights
    late_interaction: dict[str, Any] | None = None

    @property
    def dim(self) -> int:
        """Length of a vector."""
        dense, width = self.settings.dense, self.architecture.vector_size
        return dense[-1].out_features if dense else width * len(poolings(self.pooling))

    @property
    def multi_vector_dim(self) -> int | None:
        """Length of a token's vector, ``None`` where tokens have none."""
        return self.architecture.multi_vector_dim if self.settings.late is None else self.dim

    @property
    def truncate_dim(self) -> int | None:
        """Dimension that vectors are cut to where a call names none; ``None``: not cut."""
        cut = self.settings.truncate_dim
        return None if cut is None or cut >= self.dim else cut

    @property
    def modalities(self) -> list[str]:
        """What the bundle embeds."""
        return ["text"] if self.tower is None else ["text", "image"]

    def weights(self, weights: TaskWeights, scheme: Scheme) -> Weights:
        """A task's tensors, or the backbone's, as a precision wants them: rotated for small integers."""
        streams = self.architecture.streams() if scheme.rotates else ()
        if streams and self.tower is not None:
            streams += self.tower.streams()
        return RotatedWeights(weights, streams) if streams else weights

    def graph(self, weights: Weights, scheme: Scheme, backbone: Weights | None = None) -> Graph:
        """The graph of a task at a precision, of tensors as :meth:`weights` gives them.

        Args:
            weights: the task's.
            scheme: the precision.
            backbone: the backbone's, where tasks share its Linears.
        """
        return task_graph(
            self.architecture,
            weights,
            scheme,
            pooling=self.pooling,
            dense=self.settings.dense,
            normalize=self.settings.normalize,
            tanh_int8=self.settings.tanh_int8,
            backbone=backbone,
        )

    @cached_property
    def plain_graphs(self) -> list[Graph]:
        """The backbone's unquantized graph, and the vision tower's where there is one."""
        graphs = [self.graph(self.base, Float32Scheme())]
        if self.tower is not None:
            graphs.append(self.tower.graph(self.base, Float32Scheme()))
        return graphs

    @cached_property
    def graph_sha256(self) -> str:
        """Hash of the unquantized graphs without their weights: what config.json and the modules decide."""
        state = hashlib.sha256()
        for g in self.plain_graphs:
            state.update(to_model(g, [], BASE, {}).SerializeToString(deterministic=True))
            for initializer in g.initializers.values():
                tensors = [[spec.name, spec.elem_type, spec.shape] for spec in initializer.specs]
                # tables that settings alone decide count by value: files say the same in several ways
                key = initializer.key if "@" in initializer.key else digest(*initializer.compute())
                state.update(json.dumps([key, tensors]).encode())
        return state.hexdigest()

    def dense_sha256(self) -> str | None:
        """Hash of the Dense layers, ``None`` without any."""
        return dense_sha256(self.settings.dense)

    def described_licences(self) -> str:
        """Licences in a line: the model's, and those of adapters that do not come with it."""
        bound = {task: b.adapter for task, b in self.adapters.items() if b is not None}
        folder = self.checkpoint.path.resolve()
        apart = {
            task: adapter.license
            for task, adapter in bound.items()
            if adapter.license or not adapter.folder.resolve().is_relative_to(folder)
        }
        return described_licences(self.checkpoint.card.license, apart)

    def prompts(self, task: str) -> dict[str, str]:
        """Prompts of a task by name."""
        return dict(self.settings.task_prompts.get(task, self.settings.prompts))

    def default_prompt(self, task: str) -> str | None:
        """Name of the prompt of a task's texts where a call names none."""
        return self.settings.task_defaults.get(task, self.settings.default_prompt_name)
