"""The objects inside ``manifest.json``, each reading and writing its own part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embedge.runtime.bundle.image_settings import ImageSettings
from embedge.runtime.bundle.json_object import MOST_BYTES, Table
from embedge.runtime.bundle.names import A_NAME, is_name, is_path

__all__ = [
    "ActivationConstant",
    "Adapter",
    "FileEntry",
    "Model",
    "Precision",
    "Producer",
    "Source",
    "Task",
    "TokenizerSettings",
    "check_names",
    "check_path",
]

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
IMAGE_INPUTS = ("position_ids", "pool_mask", "image_features", "image_positions")
CONSTANT_TYPES = ("float32", "uint8", "int8")
SIDES = ("right", "left")
MOST_DIMENSIONS = 1 << 20  # what memory holds of a few vectors; models have some thousand
MOST_ROW_MULTIPLE = 4096
_RANGES = {"float32": (-3.4e38, 3.4e38), "uint8": (0, 255), "int8": (-128, 127)}


@dataclass(frozen=True, kw_only=True)
class Producer:
    """What wrote the bundle."""

    name: str
    version: str

    @classmethod
    def parse(cls, table: Table) -> Producer:
        """Reads the object, see :class:`Table` for what it raises."""
        return cls(name=table.string("name"), version=table.string("version"))

    def to_dict(self) -> dict[str, Any]:
        """The object as JSON."""
        return {"name": self.name, "version": self.version}


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model that was exported.

    Attributes:
        license: SPDX-like name as the source states it, ``None`` where it states none.
        sha256: hash of the base weights, ``None`` where it was not recorded.
        graph_sha256: hash of its unquantized graph without the weights, ``None`` where it was not
            recorded; an export compares it before it adds to the bundle.
        dense_sha256: hash of the Dense layers, ``None`` without any.
    """

    name: str
    model_type: str
    license: str | None
    sha256: str | None
    graph_sha256: str | None = None
    dense_sha256: str | None = None

    @classmethod
    def parse(cls, table: Table) -> Source:
        """Reads the object, see :class:`Table` for what it raises."""
        return cls(
            name=table.string("name"),
            model_type=table.string("model_type"),
            license=table.optional_string("license"),
            sha256=table.optional_string("sha256"),
            graph_sha256=table.optional_string("graph_sha256"),
            dense_sha256=table.optional_string("dense_sha256"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The object as JSON."""
        hashes = {"graph_sha256": self.graph_sha256, "dense_sha256": self.dense_sha256}
        return {
            "name": self.name,
            "model_type": self.model_type,
            "license": self.license,
            "sha256": self.sha256,
            **{key: value for key, value in hashes.items() if value is not None},
        }


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the graphs compute.

    Attributes:
        dim: length of a vector.
        pooling: "mean", "cls" or "lasttoken"; for information, it is in the graph.
        normalize: the source normalizes, so a truncated vector is normalized again.
        max_length: most tokens of a text, special tokens included.
        matryoshka_dims: dimensions that may be asked for; ``None``: any.
        truncate_dim: dimension that vectors are cut to unless a call names one; ``None``: not cut.
        multi_vector_dim: length of a token's vector, ``None`` without a multi-vector head.
        modalities: "text", "image".
        inputs: names of the task graphs' inputs; with images, all of :data:`IMAGE_INPUTS` too.
        similarity: "cosine" or "dot".
        image: how images become patches and tokens, ``None`` where they are not taken.
        include_prompt: the tokens of a prompt are pooled; where they are not, calls take no prompt.
    """

    dim: int
    pooling: str
    normalize: bool
    max_length: int
    matryoshka_dims: tuple[int, ...] | None
    multi_vector_dim: int | None
    modalities: tuple[str, ...]
    inputs: tuple[str, ...]
    similarity: str
    image: ImageSettings | None = None
    truncate_dim: int | None = None
    include_prompt: bool = True

    @classmethod
    def parse(cls, table: Table) -> Model:
        """Reads the object, see :class:`Table` for what it raises."""
        image = table.optional_table("image")
        model = cls(
            dim=table.integer("dim", minimum=1, maximum=MOST_DIMENSIONS),
            pooling=table.string("pooling"),
            normalize=table.flag("normalize"),
            max_length=table.integer("max_length", minimum=1),
            matryoshka_dims=table.optional_integers("matryoshka_dims", minimum=1),
            multi_vector_dim=table.optional_integer(
                "multi_vector_dim", minimum=1, maximum=MOST_DIMENSIONS
            ),
            modalities=table.strings("modalities"),
            inputs=table.strings("inputs"),
            similarity=table.choice("similarity", ("cosine", "dot")),
            image=None if image is None else ImageSettings.parse(image),
            truncate_dim=table.optional_integer("truncate_dim", minimum=1),
            include_prompt=table.values.get("include_prompt") is None
            or table.flag("include_prompt"),
        )
        if model.truncate_dim is not None and model.truncate_dim > model.dim:
            table.fail("truncate_dim", f"{model.truncate_dim} is above model.dim, {model.dim}")
        for index, dim in enumerate(model.matryoshka_dims or ()):
            if dim > model.dim:
                table.fail(f"matryoshka_dims[{index}]", f"{dim} is above model.dim, {model.dim}")
        needed = {"input_ids", "attention_mask", *(IMAGE_INPUTS if image else ())}
        if not needed <= set(model.inputs) <= needed | set(INPUTS):
            table.fail(
                "inputs",
                f"expected {', '.join(sorted(needed))} and perhaps token_type_ids, found "
                + (", ".join(model.inputs) or "none"),
            )
        if ("image" in model.modalities) != (image is not None):
            found = "an object" if image else "null"
            table.fail("image", f"found {found}, where modalities are {list(model.modalities)}")
        return model

    def to_dict(self) -> dict[str, Any]:
        """The object as JSON."""
        dims = self.matryoshka_dims
        return {
            "dim": self.dim,
            "pooling": self.pooling,
            "normalize": self.normalize,
            "max_length": self.max_length,
            "matryoshka_dims": None if dims is None else list(dims),
            "truncate_dim": self.truncate_dim,
            "multi_vector_dim": self.multi_vector_dim,
            "modalities": list(self.modalities),
            "inputs": list(self.inputs),
            "similarity": self.similarity,
            "image": None if self.image is None else self.image.to_dict(),
            **({} if self.include_prompt else {"include_prompt": False}),
        }


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The tokenizer file and what it does not say.

    Attributes:
        append_eos_token_id: an id to end every text with, which the file's own post-processor does
            not add; ``None`` where there is nothing to add.
        truncation_side: the end that a text which is too long loses, "right" or "left".
        table_rows: rows of the model's table of tokens, where the tokenizer has tokens beyond it.
    """

    file: str
    pad_token_id: int
    append_eos_token_id: int | None
    truncation_side: str = "right"
    table_rows: int | None = None

    @classmethod
    def parse(cls, table: Table) -> TokenizerSettings:
        """Reads the object, see :class:`Table` for what it raises."""
        return cls(
            file=_path(table, "file"),
            pad_token_id=table.integer("pad_token_id", minimum=0),
            append_eos_token_id=table.optional_integer("append_eos_token_id", minimum=0),
            truncation_side="right"
            if table.values.get("truncation_side") is None
            else table.choice("truncation_side", SIDES),
            table_rows=table.optional_integer("table_rows", minimum=1),
        )

    def to_dict(self) -> dict[str, Any]:
        """The object as JSON."""
        return {
            "file": self.file,
            "pad_token_id": self.pad_token_id,
            "append_eos_token_id": self.append_eos_token_id,
            "truncation_side": self.truncation_side,
            **({} if self.table_rows is None else {"table_rows": self.table_rows}),
        }


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The adapter a task was merged from; ``None`` for what was not recorded.

    Attributes:
        own_prompts: whether the task's prompts come from the adapter's folder, not from the model.
    """

    name: str | None
    sha256: str | None
    base_model: str | None
    own_prompts: bool = False

    @classmethod
    def parse(cls, table: Table) -> Adapter:
        """Reads the object, see :class:`Table` for what it raises."""
        return cls(
            name=table.optional_string("name"),
            sha256=table.optional_string("sha256"),
            base_model=table.optional_string("base_model"),
            own_prompts="own_prompts" in table.values and table.flag("own_prompts"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The object as JSON."""
        own = {"own_prompts": True} if self.own_prompts else {}
        return {"name": self.name, "sha256": self.sha256, "base_model": self.base_model, **own}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task's prompts by name, the one used when none is named, and its adapter (``None``:
    bare).
    """

    prompts: Mapping[str, str]
    default_prompt: str | None
    adapter: Adapter | None

    @classmethod
    def parse(cls, table: Table) -> Task:
        """Reads the object, see :class:`Table` for what it raises."""
        adapter = table.optional_table("adapter")
        task = cls(
            prompts=table.string_map("prompts", required=False),
            default_prompt=table.optional_string("default_prompt"),
            adapter=None if adapter is None else Adapter.parse(adapter),
        )
        if task.default_prompt is not None and task.default_prompt not in task.prompts:
            known = ", ".join(task.prompts) or "none"
            table.fail("default_prompt", f"{task.default_prompt!r} is not in prompts ({known})")
        return task

    def to_dict(self) -> dict[str, Any]:
        """The object as JSON."""
        return {
            "prompts": dict(self.prompts),
            "default_prompt": self.default_prompt,
            "adapter": None if self.adapter is None else self.adapter.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class ActivationConstant:
    """A scalar initializer with one value for 8-bit and one for 7-bit activations."""

    dtype: str
    full: int | float
    reduced: int | float

    @classmethod
    def parse(cls, table: Table) -> ActivationConstant:
        """Reads the object, see :class:`Table` for what it raises."""
        dtype = table.choice("dtype", CONSTANT_TYPES)
        least, most = _RANGES[dtype]
        values = {key: table.number(key) for key in ("full", "reduced")}
        for key, value in values.items():
            if not least <= value <= most or (dtype != "float32" and value % 1):
                table.fail(key, f"expected a value of {dtype}, found {value:.6g}")
        return cls(dtype=dtype, **values)

    def to_dict(self) -> dict[str, Any]:
        """The object as JSON."""
        return {"dtype": self.dtype, "full": self.full, "reduced": self.reduced}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The graphs of one precision.

    Attributes:
        graphs: path of the graph by task; a task may be missing.
        vision: path of the graph of the vision tower, which the tasks share; ``None`` without one.
        devices: "cpu", "cuda": where its kernels exist.
        row_multiple: batch × tokens has to be a multiple of this.
        activation_constants: initializers to replace where u8×s8 products saturate, by name.
        options: what the export was called with; free.
        layers: path of the layer table by task.
        fidelity: figures against the reference, by task; free, empty until ``bench --record``.
        unpack: path, by task, of the list of weights that are unpacked when its graph opens; see
            :mod:`embedge.runtime.bundle.packed_weights`. Empty where weights run as they are stored.
    """

    graphs: Mapping[str, str]
    devices: tuple[str, ...]
    row_multiple: int = 1
    activation_constants: Mapping[str, ActivationConstant] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    vision: str | None = None
    unpack: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, table: Table) -> Precision:
        """Reads the object, see :class:`Table` for what it raises."""
        graphs = table.table("graphs")
        layers = table.optional_table("layers")
        constants = table.optional_table("activation_constants")
        unpack = table.optional_table("unpack")
        return cls(
            graphs={task: _path(graphs, task) for task in graphs.values},
            devices=table.strings("devices"),
            row_multiple=table.optional_integer(
                "row_multiple", minimum=1, maximum=MOST_ROW_MULTIPLE
            )
            or 1,
            activation_constants={
                name: ActivationConstant.parse(constant)
                for name, constant in (constants.tables() if constants else ())
            },
            options=table.free("options"),
            layers={task: _path(layers, task) for task in layers.values} if layers else {},
            fidelity=table.free("fidelity"),
            vision=None if table.values.get("vision") is None else _path(table, "vision"),
            unpack={task: _path(unpack, task) for task in unpack.values} if unpack else {},
        )

    def to_dict(self) -> dict[str, Any]:
        """The object as JSON."""
        constants = self.activation_constants
        return {
            "graphs": dict(self.graphs),
            "vision": self.vision,
            "devices": list(self.devices),
            "row_multiple": self.row_multiple,
            "activation_constants": {name: c.to_dict() for name, c in constants.items()},
            "options": dict(self.options),
            "layers": dict(self.layers),
            "fidelity": dict(self.fidelity),
            **({"unpack": dict(self.unpack)} if self.unpack else {}),
        }


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file's size in bytes and its SHA-256 in lower-case hexadecimal."""

    size: int
    sha256: str

    @classmethod
    def parse(cls, table: Table) -> FileEntry:
        """Reads the object, see :class:`Table` for what it raises."""
        entry = cls(
            size=table.integer("size", minimum=0, maximum=MOST_BYTES),
            sha256=table.string("sha256"),
        )
        if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
            table.fail("sha256", f"expected 64 hexadecimal digits, found {entry.sha256[:80]!r}")
        return entry

    def to_dict(self) -> dict[str, Any]:
        """The object as JSON."""
        return {"size": self.size, "sha256": self.sha256}


def _path(table: Table, key: str) -> str:
    path = table.string(key)
    check_path(table, key, path)
    return path


def check_path(table: Table, key: str | None, path: str) -> None:
    """Refuses what is not a plain relative path below the bundle's folder."""
    if not is_path(path):
        table.fail(
            key,
            f"{path[:80]!r} is not a path inside the bundle; expected a relative one, each part of {A_NAME}; "
            "a bundle that embedge wrote has no other: export it again",
        )


def check_names(table: Table, what: str) -> None:
    """Refuses keys of an object that could not name a folder."""
    for name in table.values:
        if not is_name(name):
            table.fail(
                None,
                f"{name[:80]!r} is no name of a {what}; expected {A_NAME}; rename it, or export the bundle "
                "again",
            )
