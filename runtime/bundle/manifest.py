"""``manifest.json``: everything about a bundle that a caller could get wrong. Each of its fields is stated here.

Rules:
    * ``format_version`` is "major.minor". Another major version is refused, a newer minor one warns. 1.1
      added images, 1.2 weights that are unpacked when a graph opens, 1.3 ``truncation_side`` and
      ``truncate_dim``, 1.4 ``rotation`` in the list of weights to unpack, 1.5 ``content_sha256``, the
      licences of adapters, the source's ``hub_id``, ``late_interaction`` and ``special_token_ids``, 1.6
      ``task_tensors`` and ``base_quantization``, 1.7 ``output_ranges`` and ``token_ranges``, 1.8 ``maps``.
    * Unknown keys are ignored; a missing or wrong one is an error with its path.
    * Paths are relative to the bundle, with ``/``, and stay inside it.
    * Every graph, what it reads, layer table and the tokenizer is listed in ``files``.
    * ``from_dict`` and ``to_dict`` are inverses for documents of this version without unknown keys.

What annotations say, how they are read and written: :mod:`embedge.runtime.bundle.schema`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from embedge.runtime.bundle.contract import FORMAT_VERSION, MAPS, VISION
from embedge.runtime.bundle.files import sha256_of, size_of
from embedge.runtime.bundle.names import name_problem, path_problem
from embedge.runtime.bundle.schema import (
    MOST_BYTES,
    SPARSE,
    Place,
    ReadBy,
    Record,
    Since,
    Within,
    finite,
    record,
)
from embedge.runtime.errors import warn

__all__ = [
    "IMAGE_INPUTS",
    "ActivationConstant",
    "Adapter",
    "BaseQuantization",
    "FileEntry",
    "ImageSettings",
    "LateInteraction",
    "Manifest",
    "Model",
    "OutputRanges",
    "Precision",
    "Producer",
    "QueryExpansion",
    "Source",
    "Task",
    "TaskMaps",
    "TokenizerSettings",
]

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
POOL_MASK = "pool_mask"
IMAGE_INPUTS = ("position_ids", POOL_MASK, "image_features", "image_positions")
_BICUBIC = 3  # Pillow's number
_RANGES = {"float32": (-3.4e38, 3.4e38), "uint8": (0, 255), "int8": (-128, 127)}


def _sha256_problem(text: str) -> str | None:
    if re.fullmatch("[0-9a-f]{64}", text):
        return None
    return f"expected 64 hexadecimal digits, found {text[:80]!r}"


def _channel_problem(values: tuple[float, ...]) -> str | None:
    return None if len(values) == 3 else f"expected 3 numbers, found {len(values)}"


def _numbers(value: Any, place: Place) -> tuple[float, ...]:
    """Finite numbers; some thousand of them in a fraction of what reading each as a member takes."""
    if not isinstance(value, list):
        place.fail(f"expected a list of numbers, found {type(value).__name__}")
    if not all(type(item) in (int, float) for item in value) or not math.isfinite(sum(value)):
        for index, item in enumerate(value):
            finite(item, Place(place.file, f"{place.path}[{index}]"))
        place.fail("expected numbers whose sum is finite")
    return tuple(map(float, value))


Sha256: TypeAlias = Annotated[str, _sha256_problem]
BundlePath: TypeAlias = Annotated[str, path_problem]
TaskName: TypeAlias = Annotated[str, name_problem("task")]
PrecisionName: TypeAlias = Annotated[str, name_problem("precision")]
Count: TypeAlias = Annotated[int, Within(1)]
TokenId: TypeAlias = Annotated[int, Within(0)]
Dimension: TypeAlias = Annotated[int, Within(1, 1 << 20)]  # models have some thousand
Pixels: TypeAlias = Annotated[int, Within(1, 1 << 28)]
Number: TypeAlias = Annotated[int | float, ReadBy(finite)]
Numbers: TypeAlias = Annotated[tuple[float, ...], ReadBy(_numbers)]
Channels: TypeAlias = Annotated[tuple[float, ...], _channel_problem]


@record
class Producer(Record):
    """What wrote the bundle."""

    name: str
    version: str


@record
class BaseQuantization(Record):
    """How the base was quantized, as bitsandbytes does it, before adapters were merged into it.

    Attributes:
        kind: "nf4", "fp4" or "int8".
        block_size: weights that share a scale, ``None`` where rows do.
        double_quant: whether the scales are quantized as well.
        dtype: that of the weights before and after, by its name in torch.
        skip: modules that were left as they are.
    """

    kind: str
    block_size: Count | None = None
    double_quant: bool = False
    dtype: str
    skip: tuple[str, ...] = ()

    def __str__(self) -> str:
        """In words: ``"nf4 in blocks of 64, double-quantized, loaded in bfloat16"``."""
        parts = [
            self.kind if self.block_size is None else f"{self.kind} in blocks of {self.block_size}"
        ]
        parts += ["double-quantized"] if self.double_quant else []
        parts += [f"loaded in {self.dtype}"]
        parts += [f"without {', '.join(self.skip)}"] if self.skip else []
        return ", ".join(parts)


@record
class Source(Record):
    """The model that was exported.

    Attributes:
        license: SPDX-like name as the source states it, ``None`` where it states none.
        sha256: hash of the base weights, ``None`` where it was not recorded.
        graph_sha256: hash of its unquantized graph without the weights, ``None`` where it was not
            recorded; an export compares it before it adds to the bundle.
        dense_sha256: hash of the Dense layers, ``None`` without any.
        hub_id: its id on the hub, ``None`` where the export was not told.
        base_quantization: how it was quantized before adapters were merged, ``None`` where it was not.
    """

    name: str
    model_type: str
    license: str | None
    sha256: str | None
    graph_sha256: Annotated[str | None, Since("1.3"), SPARSE] = None
    dense_sha256: Annotated[str | None, Since("1.3"), SPARSE] = None
    hub_id: Annotated[str | None, Since("1.5"), SPARSE] = None
    base_quantization: Annotated[BaseQuantization | None, Since("1.6"), SPARSE] = None


@record
class ImageSettings(Record):
    """How images become patches, and what tokens stand around them: Qwen2-VL's image processor and prompt.

    Attributes:
        patch_size: pixels of a patch's side.
        temporal_patch_size: frames of a patch; a still image is repeated.
        merge_size: patches of a feature's side.
        min_pixels: fewest pixels an image is scaled to.
        max_pixels: most pixels an image is scaled to.
        image_mean: mean of each channel, of values from 0 to 1.
        image_std: standard deviation of each channel.
        rescale_factor: from pixel values to values from 0 to 1.
        resample: Pillow's number of the resampling filter; bicubic.
        window_size: pixels of an attention window's side.
        rotary_dim: rotary angles of a patch, half of them for its row, half for its column.
        rotary_theta: base of the angles' frequencies.
        hidden_size: width of an image feature.
        before_ids: tokens before the features.
        image_token_id: the token whose places the features take.
        after_ids: tokens after them.
        pooled_before: how many of the last ``before_ids`` a mean includes.
        pooled_after: how many of the first ``after_ids`` a mean includes.
    """

    patch_size: Annotated[int, Within(1, 1024)]
    temporal_patch_size: Annotated[int, Within(1, 16)]
    merge_size: Annotated[int, Within(1, 64)]
    min_pixels: Pixels
    max_pixels: Pixels
    image_mean: Channels
    image_std: Channels
    rescale_factor: float
    resample: Annotated[int, Within(0)]
    window_size: Count
    rotary_dim: Annotated[int, Within(2, 4096)]
    rotary_theta: float
    hidden_size: Dimension
    before_ids: tuple[TokenId, ...]
    image_token_id: TokenId
    after_ids: tuple[TokenId, ...]
    pooled_before: Annotated[int, Within(0)]
    pooled_after: Annotated[int, Within(0)]

    @property
    def factor(self) -> int:
        """Pixels of a feature's side; both sides of a scaled image are multiples of it."""
        return self.patch_size * self.merge_size

    def _problems(self) -> Iterator[tuple[str, str]]:
        if self.resample != _BICUBIC:
            yield "resample", f"expected {_BICUBIC} (bicubic), found {self.resample}"
        if self.rotary_dim % 2:
            yield "rotary_dim", f"expected an even number, found {self.rotary_dim}"
        if self.window_size % self.factor:
            yield "window_size", f"expected a multiple of {self.factor}"
        if self.factor**2 > self.max_pixels:
            yield "max_pixels", f"expected at least {self.factor}², those of a feature"
        if self.min_pixels > self.max_pixels:
            yield "min_pixels", f"expected at most max_pixels, {self.max_pixels}"
        if min(self.image_std) <= 0:
            yield "image_std", "expected positive numbers"
        if self.pooled_before > len(self.before_ids):
            yield "pooled_before", f"expected at most {len(self.before_ids)}"
        if self.pooled_after > len(self.after_ids):
            yield "pooled_after", f"expected at most {len(self.after_ids)}"


@record
class QueryExpansion(Record):
    """What short queries are filled up with: tokens that are scored like a query's own.

    Attributes:
        length: tokens of a query then.
        token_id: of the filling.
        attend: whether other tokens attend to it; ``attention_mask`` is 0 there if not.
    """

    length: Count
    token_id: TokenId
    attend: bool


@record
class LateInteraction(Record):
    """How queries and documents become vectors of tokens (ColBERT, arXiv 2004.12832).

    Attributes:
        query_length: most tokens of a query, special tokens included.
        document_length: likewise of a document.
        text_length: likewise of a text that is neither.
        expansion: what short queries are filled up with, ``None`` for nothing.
        skipped_ids: tokens whose vectors are left out.
        skipped_in: "query", "document": of which texts; a text that is neither counts as a document.
    """

    query_length: Count
    document_length: Count
    text_length: Count
    expansion: QueryExpansion | None = None
    skipped_ids: tuple[TokenId, ...] = ()
    skipped_in: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """Most tokens of any text."""
        return max(self.query_length, self.document_length, self.text_length)

    def length(self, role: str | None) -> int:
        """Most tokens of a text by its role, "query", "document" or neither."""
        by_role = {"query": self.query_length, "document": self.document_length}
        return self.text_length if role is None else by_role[role]

    def _problems(self) -> Iterator[tuple[str, str]]:
        if self.expansion is not None and self.expansion.length > self.query_length:
            yield "expansion.length", f"expected at most query_length, {self.query_length}"
        for index, role in enumerate(self.skipped_in):
            if role not in ("query", "document"):
                yield f"skipped_in[{index}]", f"expected query or document, found {role[:80]!r}"


@record
class Model(Record):
    """What the graphs compute.

    Attributes:
        dim: length of a vector.
        pooling: names of sentence-transformers' poolings, joined by "+"; for information, it is in the
            graph.
        normalize: the source normalizes, so a truncated vector is normalized again.
        max_length: most tokens of a text, special tokens included.
        matryoshka_dims: dimensions that may be asked for; ``None``: any.
        truncate_dim: dimension that vectors are cut to unless a call names one; ``None``: not cut.
        multi_vector_dim: length of a token's vector, ``None`` without a multi-vector head.
        modalities: "text", "image".
        inputs: names of the task graphs' inputs; with images, all of :data:`IMAGE_INPUTS` too.
        similarity: how vectors are compared: "maxsim" and "meanmaxsim" with late interaction.
        image: how images become patches and tokens, ``None`` where they are not taken.
        include_prompt: the tokens of a prompt are pooled; where they are not, and ``inputs`` lack
            ``pool_mask``, calls take no prompt.
        late_interaction: how queries and documents become vectors of tokens, where a text has no single one;
            ``dim`` is ``multi_vector_dim`` then.
    """

    dim: Dimension
    pooling: str
    normalize: bool
    max_length: Count
    matryoshka_dims: tuple[Count, ...] | None
    truncate_dim: Annotated[Count | None, Since("1.3")] = None
    multi_vector_dim: Dimension | None
    modalities: tuple[str, ...]
    inputs: tuple[str, ...]
    similarity: Literal["cosine", "dot", "maxsim", "meanmaxsim"]
    image: Annotated[ImageSettings | None, Since("1.1")] = None
    include_prompt: Annotated[bool, Since("1.4"), SPARSE] = True
    late_interaction: Annotated[LateInteraction | None, Since("1.5"), SPARSE] = None

    def _problems(self) -> Iterator[tuple[str, str]]:
        if self.truncate_dim is not None and self.truncate_dim > self.dim:
            yield "truncate_dim", f"{self.truncate_dim} is above model.dim, {self.dim}"
        for index, dim in enumerate(self.matryoshka_dims or ()):
            if dim > self.dim:
                yield f"matryoshka_dims[{index}]", f"{dim} is above model.dim, {self.dim}"
        needed = {*INPUTS[:2], *(IMAGE_INPUTS if self.image else ())}
        optional = {INPUTS[2]} if self.include_prompt else {INPUTS[2], POOL_MASK}
        if not needed <= set(self.inputs) <= needed | optional:
            found = ", ".join(self.inputs) or "none"
            more = " and ".join(n for n in (INPUTS[2], POOL_MASK) if n in optional - needed)
            expected = f"{', '.join(sorted(needed))} and perhaps {more}"
            yield "inputs", f"expected {expected}, found {found}"
        late = self.late_interaction is not None
        if late != (self.similarity in ("maxsim", "meanmaxsim")):
            yield (
                "similarity",
                f"found {self.similarity}, where late_interaction is {'not ' * late}null",
            )
        if self.late_interaction is not None and self.late_interaction.longest > self.max_length:
            longest = self.late_interaction.longest
            yield (
                "max_length",
                f"{self.max_length} is below the longest of late_interaction, {longest}",
            )
        if late and self.multi_vector_dim != self.dim:
            yield "multi_vector_dim", f"expected dim, {self.dim}, found {self.multi_vector_dim}"
        if ("image" in self.modalities) != (self.image is not None):
            found = "an object" if self.image else "null"
            yield "image", f"found {found}, where modalities are {list(self.modalities)}"


@record
class TokenizerSettings(Record):
    """The tokenizer file and what it does not say.

    Attributes:
        append_eos_token_id: an id to end every text with, which the file's own post-processor does
            not add; ``None`` where there is nothing to add.
        truncation_side: the end that a text which is too long loses.
        table_rows: rows of the model's table of tokens, where the tokenizer has tokens beyond it.
        special_token_ids: of the special tokens with a name, where prompts are left out of the pooling: one
            that ends the tokens of a prompt alone is not the prompt's.
    """

    file: BundlePath
    pad_token_id: TokenId
    append_eos_token_id: TokenId | None
    truncation_side: Annotated[Literal["right", "left"], Since("1.3")] = "right"
    table_rows: Annotated[Count | None, Since("1.4"), SPARSE] = None
    special_token_ids: Annotated[tuple[TokenId, ...], Since("1.5"), SPARSE] = ()


@record
class Adapter(Record):
    """The adapter a task was merged from; ``None`` for what was not recorded.

    Attributes:
        license: what the adapter's own card declares; ``None`` where it has no card, or says nothing.
        own_prompts: whether the task's prompts come from the adapter's folder, not from the model.
    """

    name: str | None
    sha256: str | None
    base_model: str | None
    license: Annotated[str | None, Since("1.5"), SPARSE] = None
    own_prompts: Annotated[bool, Since("1.4"), SPARSE] = False


@record
class OutputRanges(Record):
    """The range of each dimension of a task's vectors, of which 8-bit output formats make codes.

    They are those of some texts, widened by half of their width on each side: hardly a vector of another text is
    clipped then, at the cost of steps twice as wide. All precisions of a task share them, so that one's queries find
    another's documents.

    Attributes:
        lowest: of each dimension, of whole vectors as the graph gives them.
        highest: likewise.
        mean_square: of each dimension over the texts. A vector that is cut to ``n`` values and normalized is longer
            than before by the root of the sum of the first ``n`` of these; its ranges are so much wider.
        vectors: how many they are of.
    """

    lowest: Numbers
    highest: Numbers
    mean_square: Numbers
    vectors: Count

    def _problems(self) -> Iterator[tuple[str, str]]:
        for key in ("highest", "mean_square"):
            if len(getattr(self, key)) != len(self.lowest):
                found = len(getattr(self, key))
                yield (
                    key,
                    f"expected as many numbers as lowest has, {len(self.lowest)}, found {found}",
                )
        pairs = zip(self.lowest, self.highest, self.mean_square, strict=False)
        for index, (low, high, square) in enumerate(pairs):
            if high < low:
                yield f"highest[{index}]", f"{high:.6g} is below lowest[{index}], {low:.6g}"
            if square < 0:
                yield (
                    f"mean_square[{index}]",
                    f"expected a number of at least 0, found {square:.6g}",
                )


@record
class Task(Record):
    """A task's prompts by name, the one used when none is named, and its adapter (``None``: bare).

    Attributes:
        output_ranges: of its vectors, ``None`` where they were not calibrated.
        token_ranges: likewise of its multi-vectors.
    """

    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None
    adapter: Adapter | None
    output_ranges: Annotated[OutputRanges | None, Since("1.7"), SPARSE] = None
    token_ranges: Annotated[OutputRanges | None, Since("1.7"), SPARSE] = None

    def _problems(self) -> Iterator[tuple[str, str]]:
        if self.default_prompt is not None and self.default_prompt not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            yield "default_prompt", f"{self.default_prompt!r} is not in prompts ({known})"


@record
class ActivationConstant(Record):
    """A scalar initializer with one value for 8-bit and one for 7-bit activations."""

    dtype: Literal["float32", "uint8", "int8"]
    full: Number
    reduced: Number

    def _problems(self) -> Iterator[tuple[str, str]]:
        least, most = _RANGES[self.dtype]
        for key, value in (("full", self.full), ("reduced", self.reduced)):
            if not least <= value <= most or (self.dtype != "float32" and value % 1):
                yield key, f"expected a value of {self.dtype}, found {value:.6g}"


@record
class TaskMaps(Record):
    """A graph that gives the vectors of several tasks from one pass: through the adapter of one, then by maps.

    Attributes:
        graph: its path. Its output ``embeddings`` is float32 ``[batch, tasks, dim]``.
        base: the task whose adapter and prompts the pass has.
        tasks: in the order of the output.
        content_sha256: what it computes, see :mod:`embedge.runtime.bundle.content`.
        texts: how many the maps were fitted on.
        fidelity: by task, of held-out texts: cosines to the vectors of the task's own graph, and more; free.
    """

    graph: BundlePath
    base: TaskName
    tasks: tuple[TaskName, ...]
    content_sha256: Sha256
    texts: Count
    fidelity: Mapping[str, Any] = field(default_factory=dict)

    def _problems(self) -> Iterator[tuple[str, str]]:
        if self.base not in self.tasks or len(set(self.tasks)) != len(self.tasks):
            yield (
                "tasks",
                f"expected different names, base among them, found {', '.join(self.tasks)}",
            )


@record
class Precision(Record):
    """The graphs of one precision.

    Attributes:
        graphs: path of the graph by task; a task may be missing.
        vision: path of the graph of the vision tower, which the tasks share; ``None`` without one.
        devices: "cpu", "cuda": where its kernels exist.
        row_multiple: batch × tokens has to be a multiple of this.
        activation_constants: initializers of 8-bit activations by name, listed where matmuls are of 8-bit
            integers, with the values of 7 bits; the runtime does not replace them.
        options: what the export was called with; free.
        layers: path of the layer table by task.
        fidelity: figures against the reference, by task; free, empty until ``bench --record``.
        unpack: path, by task, of the list of weights that are unpacked when its graph opens; see
            :mod:`embedge.runtime.bundle.packed_weights`. Empty where weights run as they are stored.
        content_sha256: by task, what its graph computes, and under ``VISION`` that of the tower; see
            :mod:`embedge.runtime.bundle.content`. Empty where an earlier embedge exported.
        task_tensors: path, by task, of what it brings to a graph that tasks share, see
            :mod:`embedge.runtime.bundle.task_tensors`. Empty where each has its own.
        portable: no two products of its 8-bit matmuls exceed 16 bits together, so that they are exact on
            every processor in any session of ONNX Runtime.
        maps: the graph that gives several tasks' vectors from one pass; ``None`` where none was fitted.
    """

    graphs: Mapping[str, BundlePath]
    vision: Annotated[BundlePath | None, Since("1.1")] = None
    devices: tuple[str, ...]
    row_multiple: Annotated[int, Within(1, 4096)] = 1
    activation_constants: Mapping[str, ActivationConstant] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, BundlePath] = field(default_factory=dict)
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    unpack: Annotated[Mapping[str, BundlePath], Since("1.2"), SPARSE] = field(default_factory=dict)
    content_sha256: Annotated[Mapping[str, Sha256], Since("1.5"), SPARSE] = field(
        default_factory=dict
    )
    portable: Annotated[bool, Since("1.5"), SPARSE] = False
    task_tensors: Annotated[Mapping[str, BundlePath], Since("1.6"), SPARSE] = field(
        default_factory=dict
    )

    maps: Annotated[TaskMaps | None, Since("1.8"), SPARSE] = None

    @property
    def saturates(self) -> bool:
        """Whether its 8-bit matmuls need a session's option where two products are added in 16 bits."""
        return bool(self.activation_constants) and not self.portable


@record
class FileEntry(Record):
    """A file's size in bytes and its SHA-256 in lower-case hexadecimal."""

    size: Annotated[int, Within(0, MOST_BYTES)]
    sha256: Sha256

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """That of a file; raises as :func:`embedge.runtime.bundle.files.sha256_of`."""
        sha256, state = sha256_of(path)
        return cls(size=size_of(state), sha256=sha256)


@record
class Manifest(Record):
    """A parsed ``manifest.json``."""

    format_version: str = FORMAT_VERSION
    producer: Producer
    source: Source
    model: Model
    tokenizer: TokenizerSettings
    tasks: Mapping[TaskName, Task]
    precisions: Mapping[PrecisionName, Precision]
    files: Mapping[BundlePath, FileEntry]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], file: str = "manifest.json") -> Manifest:
        """The manifest in a parsed JSON document.

        Args:
            values: the document.
            file: its name, for messages.

        Raises:
            ManifestError: with the path of the first key that cannot be used, or for a
                ``format_version`` of another major version.
        """
        place = Place(file)
        _check_version(_Version.parse(values, place).format_version, place)
        return cls.parse(values, place)

    @property
    def files_sha256(self) -> str:
        """The SHA-256 of the names and hashes of all files, which figures written into the manifest leave alone."""
        listed = sorted((name, entry.sha256) for name, entry in self.files.items())
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def folder_bytes(self, precision: str) -> int:
        """Bytes of the files in the folders of a precision's graphs, which another may use too."""
        graphs = self.precisions[precision].graphs.values()
        folders = tuple({path.rpartition("/")[0] + "/" for path in graphs})
        return sum(entry.size for name, entry in self.files.items() if name.startswith(folders))

    def _problems(self) -> Iterator[tuple[str, str]]:
        # Every task and file that is named exists in the manifest.
        if not self.tasks or not self.precisions:
            missing = "precisions" if self.tasks else "tasks"
            yield missing, "expected at least one, found none"
        yield from self._range_problems()
        yield from self._map_problems()
        named = {"tokenizer.file": self.tokenizer.file}
        for name, precision in self.precisions.items():
            if precision.maps is not None:
                named[f"precisions.{name}.maps.graph"] = precision.maps.graph
        for name, precision in self.precisions.items():
            if precision.vision is not None:
                key = f"precisions.{name}.vision"
                if self.model.image is None:
                    yield key, "expected null, as model.image is"
                if VISION in self.tasks:
                    yield key, f"a task has the name {VISION!r} as well"
                named[key] = precision.vision
            for kind in ("graphs", "layers", "unpack", "task_tensors"):
                for task, path in getattr(precision, kind).items():
                    key = f"precisions.{name}.{kind}.{task}"
                    if task not in self.tasks:
                        yield key, f"no such task; tasks: {', '.join(self.tasks)}"
                    named[key] = path
        for key, path in named.items():
            if path not in self.files:
                yield key, f"{path!r} is not listed in files"

    def _map_problems(self) -> Iterator[tuple[str, str]]:
        # Maps are of tasks with a graph, and no task has their name.
        for name, precision in self.precisions.items():
            if precision.maps is None:
                continue
            key = f"precisions.{name}.maps"
            if MAPS in self.tasks:
                yield key, f"a task has the name {MAPS!r} as well"
            for task in precision.maps.tasks:
                if task not in precision.graphs:
                    known = ", ".join(precision.graphs)
                    yield f"{key}.tasks", f"{task} has no graph; those of {name}: {known}"

    def _range_problems(self) -> Iterator[tuple[str, str]]:
        # Ranges are as long as the vectors.
        dims = {"output_ranges": self.model.dim, "token_ranges": self.model.multi_vector_dim or 0}
        for name, task in self.tasks.items():
            for key, dim in dims.items():
                ranges = getattr(task, key)
                if ranges is not None and len(ranges.lowest) != dim:
                    yield (
                        f"tasks.{name}.{key}.lowest",
                        f"expected {dim} numbers, found {len(ranges.lowest)}",
                    )


@record
class _Version(Record):
    """What is read of a document before anything else."""

    format_version: str


def _check_version(version: str, document: Place) -> None:
    place = document.member("format_version")
    match = re.fullmatch(r"(\d{1,9})\.(\d{1,9})", version)
    if match is None:
        place.fail(f'expected "major.minor", found {version!r}')
    known_major, known_minor = map(int, FORMAT_VERSION.split("."))
    major, minor = map(int, match.groups())
    if major != known_major:
        hint = "upgrade embedge" if major > known_major else "export the bundle again"
        place.fail(f"this embedge reads version {known_major}.x, the bundle is {version}; {hint}")
    if minor > known_minor:
        warn(
            f"{document.file}: format_version {version} is newer than {FORMAT_VERSION}, which this "
            "embedge knows; what it does not know is ignored"
        )
