"""Vectors of many rows on many cores or machines, with Ray Data's pools of actors.

    import ray
    from embedge.integrations.ray import embed_dataset, embed_parquet

    ds = embed_dataset(ray.data.read_parquet("texts"), "bundle", task="code", columns="text", actors=2)
    embed_parquet("texts", "vectors", "bundle", task="code", actors=2)    # again after a kill: goes on

Each actor has one ``Embedder``, opened once, with threads of its own. Whether task, precision, prompt, length and
columns can be used is looked at before the first actor starts, by opening the bundle where the call is made. Every
actor then compares the fingerprint of its vectors with the one found there: a node whose bundle or processor gives
others is refused. The bundle's folder has to be there under the same path on every node.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np

from embedge.runtime import Embedder, EmbedgeError, EmbedgeImportError, EmbedgeValueError
from embedge.runtime.bundle.writing import NewFile
from embedge.runtime.host.install_advice import install_command
from embedge.runtime.host.progress import LogLines, Progress
from embedge.runtime.scoring.quantization import code_dtype, code_width
from embedge.runtime.scoring.similarity import TOKEN_KINDS
from embedge.runtime.tables.chunk import EMBEDDING
from embedge.runtime.tables.parquet_input import ParquetInput, check_text_column, texts_of
from embedge.runtime.tables.parquet_output import (
    ParquetOutput,
    read_metadata,
    vector_array,
    vector_type,
)

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset

__all__ = ["EmbeddedFiles", "RayOptions", "embed_dataset", "embed_parquet"]

_BATCH_ROWS = 4096
_CHARACTERS = 4_000_000
_SOURCE = "embedge.source"
_IN_FLIGHT = 2  # batches that wait at an actor: the one that runs, and the next


class RayOptions(TypedDict, total=False):
    """What decides which vectors the rows get, as :class:`embedge.Embedder` and its ``encode`` take it.

    ``task`` and ``precision`` may be left out where the bundle has exactly one. ``role`` is "query" or "document":
    embed as ``encode_query`` or ``encode_document`` do; late-interaction models ask for one. ``multi_vector`` gives a
    vector a token. ``output_format`` is "float32", "float16" or one of codes, such as "int8" and "binary".
    """

    task: str | None
    precision: str | None
    prompt_name: str | None
    prompt: str | None
    role: str | None
    truncate_dim: int | None
    normalize_embeddings: bool
    multi_vector: bool
    output_format: str
    max_batch_tokens: int | None
    on_truncate: str
    verify: str


@dataclass(frozen=True, kw_only=True)
class EmbeddedFiles:
    """What :func:`embed_parquet` has done.

    Attributes:
        files: that were embedded now.
        kept: that an earlier run had embedded.
        rows: of the files that were embedded now.
        fingerprint: of all vectors.
    """

    files: int
    kept: int
    rows: int
    fingerprint: str


def embed_dataset(
    ds: Dataset,
    bundle: str | os.PathLike[str],
    *,
    columns: str | Mapping[str, str] = "text",
    actors: int = 1,
    threads_per_actor: int | None = None,
    batch_size: int = _BATCH_ROWS,
    **options: Unpack[RayOptions],
) -> Dataset:
    """Adds columns of vectors to a dataset, lazily as Ray Data's other transformations.

    Args:
        ds: with columns of strings.
        bundle: its folder, under this path on every node.
        columns: a column of texts, whose vectors go into ``embedding``, or the columns' names and those of their
            vectors: ``{"title": "title_vector", "body": "body_vector"}``.
        actors: processes that embed at the same time, on all nodes together.
        threads_per_actor: cores that each uses. ``None``: the cluster's, divided among the actors.
        batch_size: rows of a call.
        **options: see :class:`RayOptions`.

    Returns:
        The dataset with columns of ``fixed_size_list`` more, ``[dim]`` a row, of float32 or what ``output_format``
        asks for; with multi-vectors lists of such lists.

    Raises:
        EmbedgeValueError: for an argument that cannot be used, or a column that is not there or holds no strings.
        EmbedgeError: the bundle cannot be used.
        EmbedgeImportError: Ray is missing.
    """
    targets = {columns: EMBEDDING} if isinstance(columns, str) else dict(columns)
    _check_pool(actors, threads_per_actor, batch_size)
    plan = _plan(bundle, options)
    _check_columns(ds, targets)
    pool = _pool(actors, threads_per_actor)
    plan = dataclasses.replace(plan, threads=pool.threads)
    added: Dataset = ds.map_batches(
        _Columns,
        fn_constructor_kwargs={"plan": plan, "targets": targets},
        batch_format="pyarrow",
        batch_size=batch_size,
        udf_modifying_row_count=False,
        **pool.arguments,
    )
    return added


def embed_parquet(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    bundle: str | os.PathLike[str],
    *,
    column: str = "text",
    keep: Sequence[str] | None = None,
    actors: int = 1,
    threads_per_actor: int | None = None,
    show_progress_bar: bool | None = None,
    **options: Unpack[RayOptions],
) -> EmbeddedFiles:
    """Embeds Parquet files, each into a file of its name in a folder; called again, it goes on with those left.

    An actor reads a file row group by row group, so that memory stays bounded, and gives the output its name when it
    is whole and on the disk. An actor that is killed loses the file that it had in hand, which another one begins
    anew: no row is lost or doubled. Files of some ten thousand rows keep that small and all actors busy to the end.

    Args:
        inputs: a folder, with its ``.parquet`` files at any depth, a file, or files of different names.
        output: a folder, made if it is not there. All nodes see both under the same path.
        bundle: its folder, under this path on every node.
        column: with the texts.
        keep: the other columns to write beside the vectors; ``None``: all.
        actors: processes that embed at the same time, on all nodes together.
        threads_per_actor: cores that each uses. ``None``: the cluster's, divided among the actors.
        show_progress_bar: on standard error; ``None``: on a terminal, elsewhere a line now and then.
        **options: see :class:`RayOptions`.

    Returns:
        How many files were embedded and kept.

    Raises:
        EmbedgeValueError: for an argument that cannot be used, or a column that is not there or holds no strings.
        EmbedgeError: a file cannot be read or written, a row has no text, or a file in ``output`` was made of
            another input or with other options.
        EmbedgeImportError: Ray is missing.
    """
    _check_pool(actors, threads_per_actor, 1)
    plan = _plan(bundle, options)
    folder = Path(output).absolute()
    work = list(_work(inputs, folder))
    made_of = {"column": column, "keep": None if keep is None else list(keep)}
    pending = []
    rows = 0
    for item in work:
        source = ParquetInput(item["source"], column, keep=keep)
        source.close()
        item["made_of"] = {**made_of, "rows": source.rows, **_identity(item["source"])}
        if not _is_done(item, plan):
            pending.append(item)
            rows += source.rows
    kept = len(work) - len(pending)
    if pending:
        for item in pending:
            Path(item["target"]).parent.mkdir(parents=True, exist_ok=True)
        pool = _pool(min(actors, len(pending)), threads_per_actor)
        worker = {"plan": dataclasses.replace(plan, threads=pool.threads), "work": pending}
        with _progress(rows, show_progress_bar) as progress:
            for done in _run(len(pending), worker, pool):
                progress.advance(int(done["rows"]))
    return EmbeddedFiles(
        files=len(pending), kept=kept, rows=rows, fingerprint=plan.kind["fingerprint"]
    )


@dataclass(frozen=True)
class _Plan:
    """What an actor opens and calls.

    Attributes:
        bundle: its folder.
        opening: arguments of ``Embedder``.
        encoding: arguments of its methods.
        role: "query", "document" or ``None``.
        kind: the fingerprint that its vectors have to have, and its parts.
        threads: of an actor.
    """

    bundle: str
    opening: Mapping[str, Any]
    encoding: Mapping[str, Any]
    role: str | None
    kind: Mapping[str, Any]
    threads: int = 1

    @property
    def multi_vector(self) -> bool:
        """Whether a row has a vector a token."""
        return bool(self.encoding["multi_vector"])

    @property
    def output_format(self) -> str:
        """What the vectors are given as."""
        return str(self.encoding.get("output_format", "float32"))

    @property
    def dtype(self) -> str:
        """The type of a vector's numbers."""
        return np.dtype(code_dtype(self.output_format)).name

    @property
    def dim(self) -> int:
        """How many numbers a vector has; with one bit each an eighth of its length."""
        return int(code_width(self.output_format, self.kind["parts"]["dim"]))

    def check(self, stored: Mapping[str, Any]) -> None:
        """Refuses parts of the fingerprint of other vectors.

        Raises:
            FingerprintError: naming what differs.
        """
        if stored != self.kind["parts"]:
            with Embedder(self.bundle, **self.opening) as model:
                model.check_fingerprint(stored, **_deciding(self.encoding, self.role))

    def open(self) -> Callable[[Sequence[str]], Any]:
        """Opens the bundle; gives what embeds texts.

        Raises:
            FingerprintError: its vectors are of another kind than where the job was started.
        """
        # Before the tokenizer's threads start: of them, too, there are as many as the actor has cores.
        os.environ.setdefault("RAYON_NUM_THREADS", str(self.threads))
        model = Embedder(self.bundle, **self.opening, threads=self.threads)
        model.check_fingerprint(self.kind, **_deciding(self.encoding, self.role))
        encode = _encoder(model, self.role)
        return lambda texts: encode(list(texts), **self.encoding)


class _Columns:
    """An actor of :func:`embed_dataset`."""

    def __init__(self, plan: _Plan, targets: Mapping[str, str]) -> None:
        self._encode = plan.open()
        self._targets = targets
        self._dtype = plan.dtype
        self._type = vector_type(plan.dim, plan.dtype, multi_vector=plan.multi_vector)

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        for column, target in self._targets.items():
            texts = texts_of(batch.column(column), f"a batch, column {column!r}")
            vectors = vector_array(self._encode(texts), self._type, self._dtype)
            if target in batch.column_names:
                batch = batch.drop_columns(target)
            batch = batch.append_column(target, vectors)
        return batch


class _Files:
    """An actor of :func:`embed_parquet`."""

    def __init__(self, plan: _Plan, work: Sequence[Mapping[str, Any]]) -> None:
        self._encode = plan.open()
        self._plan = plan
        self._work = work

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        done: dict[str, list[Any]] = {"target": [], "rows": []}
        for item in (self._work[int(number)] for number in batch["id"]):
            done["target"].append(item["target"])
            done["rows"].append(self._embed(item))
        return done

    def _embed(self, item: Mapping[str, Any]) -> int:
        made_of = item["made_of"]
        _check_unchanged(item)
        source = ParquetInput(item["source"], made_of["column"], keep=made_of["keep"])
        new = None
        try:
            new = NewFile(Path(item["target"]))
            output = ParquetOutput(
                _Bytes(new),
                dim=self._plan.dim,
                dtype=self._plan.dtype,
                multi_vector=self._plan.multi_vector,
                columns=source.schema,
                kind=self._plan.kind,
                metadata={_SOURCE: made_of},
            )
            for chunk in source.chunks(rows=_BATCH_ROWS, characters=_CHARACTERS):
                output.write(chunk.others, self._encode(chunk.texts))
            output.close()
            _check_unchanged(item)
            new.commit()
        except OSError as error:
            raise EmbedgeError(f"{item['target']}: {error.strerror or error}") from error
        finally:
            if new is not None:
                new.discard()
            source.close()
        return source.rows


class _Bytes:
    """A new file, as :class:`ParquetOutput` writes to it."""

    def __init__(self, new: NewFile) -> None:
        self._file = new.file

    def write(self, data: bytes) -> None:
        self._file.write(data)


@dataclass(frozen=True)
class _Pool:
    threads: int
    arguments: Mapping[str, Any]


def _pool(actors: int, threads_per_actor: int | None) -> _Pool:
    """How many threads an actor has, and what ``map_batches`` is told of the actors.

    Ray counts the cores that tasks ask for. If the actors asked for all of them, the tasks that read for them would
    wait forever, so one core at least is left to these in the count, though not on the machine.
    """
    ray = _load_ray()
    if not ray.is_initialized():
        ray.init()
    cores = float(ray.cluster_resources().get("CPU", 1))
    threads = threads_per_actor or max(int(cores // actors), 1)
    asked = min(float(threads), max(cores - 1, 0.0) / actors)
    arguments = {
        "compute": ray.data.ActorPoolStrategy(
            size=actors, max_tasks_in_flight_per_actor=_IN_FLIGHT, max_concurrent_calls_per_actor=1
        ),
        "num_cpus": float(int(asked)) if asked >= 1 else round(asked, 4),  # whole above one
    }
    return _Pool(threads, arguments)


def _run(files: int, worker: Mapping[str, Any], pool: _Pool) -> Iterator[Mapping[str, Any]]:
    """What the actors say of each file once it has its name; their errors are those of embedge."""
    ray = _load_ray()
    ds = ray.data.range(files, override_num_blocks=files)
    ds.context.enable_progress_bars = False
    ds.context.raise_original_map_exception = True
    ds = ds.map_batches(
        _Files,
        fn_constructor_kwargs=worker,
        batch_size=1,
        batch_format="numpy",
        udf_modifying_row_count=False,
        **pool.arguments,
    )
    try:
        yield from ds.iter_rows()
    except Exception as error:
        cause = _cause(error)
        if cause is None:
            raise
        raise cause from error


def _cause(error: BaseException) -> EmbedgeError | None:
    """The error of embedge inside Ray's."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, EmbedgeError):
        seen = getattr(seen, "cause", None) or seen.__cause__
    return seen


def _plan(bundle: str | os.PathLike[str], options: RayOptions) -> _Plan:
    """Opens the bundle here, so that a wrong call shows before an actor starts."""
    if unknown := set(options) - set(RayOptions.__annotations__):
        raise TypeError(
            f"unexpected keyword argument {sorted(unknown)[0]!r}; expected one of "
            f"{', '.join(RayOptions.__annotations__)}"
        )
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    role = given.pop("role", None)
    if role not in (None, "query", "document"):
        raise EmbedgeValueError(f"role is {role!r}; expected 'query', 'document' or None")
    opening: dict[str, Any] = {"device": "cpu"}
    opening |= {name: given.pop(name) for name in ("task", "precision", "verify") if name in given}
    path = str(Path(bundle).absolute())
    with Embedder(path, **opening) as model:
        late = model.similarity_fn_name in TOKEN_KINDS
        if late and role is None:
            raise EmbedgeValueError(
                f"{path}: a late-interaction model, whose queries and documents differ; expected role='query' or "
                "role='document'"
            )
        given["multi_vector"] = late or given.get("multi_vector", False)
        _encoder(model, role)([], **given)  # a wrong option shows here
        deciding = _deciding(given, role)
        kind = {
            "fingerprint": model.fingerprint(**deciding),
            "parts": model.fingerprint_parts(**deciding),
        }
        return _Plan(path, opening, given, role, kind)


def _encoder(model: Embedder, role: str | None) -> Callable[..., Any]:
    if role is None:
        return model.encode
    return model.encode_query if role == "query" else model.encode_document


def _deciding(encoding: Mapping[str, Any], role: str | None) -> dict[str, Any]:
    """Of the arguments of ``encode`` those that decide of which kind the vectors are."""
    others = ("max_batch_tokens", "on_truncate")
    return {k: v for k, v in encoding.items() if k not in others} | {"role": role}


def _check_pool(actors: int, threads: int | None, batch_size: int) -> None:
    for name, value in (("actors", actors), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise EmbedgeValueError(f"{name} is {value!r}; expected a whole number of at least 1")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise EmbedgeValueError(
            f"threads_per_actor is {threads!r}; expected a whole number of at least 1, or None"
        )


def _check_columns(ds: Dataset, targets: Mapping[str, str]) -> None:
    """Refuses columns of texts that are not there, and vectors' columns that would collide."""
    if (
        not targets
        or len(set(targets.values())) < len(targets)
        or set(targets) & set(targets.values())
    ):
        raise EmbedgeValueError(
            f"columns is {targets!r}; expected a name for the vectors of each column of texts, all different"
        )
    schema = ds.schema()
    if schema is None:
        raise EmbedgeValueError("ds: expected a dataset with columns, found one without a row")
    import pyarrow

    base = schema.base_schema
    for column in targets:
        if isinstance(base, pyarrow.Schema):
            check_text_column(base, column, "ds")
        elif column not in schema.names:  # of pandas' blocks, whose types say less
            raise EmbedgeValueError(
                f"ds: expected one column {column!r}, found no such column; columns there: {', '.join(schema.names)}"
            )


def _work(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], output: Path
) -> Iterator[dict[str, Any]]:
    """Each input with the file that it becomes."""
    one = isinstance(inputs, (str, os.PathLike))
    paths = [Path(inputs)] if isinstance(inputs, (str, os.PathLike)) else list(map(Path, inputs))
    seen: dict[Path, Path] = {}
    if one and paths[0].is_dir():
        root = paths[0]
        if output.resolve().is_relative_to(root.resolve()):
            raise EmbedgeValueError(
                f"output: {output} is the inputs' folder, or inside it, where its files would be inputs the next time; "
                "name a folder elsewhere"
            )
        names = {path: path.relative_to(root) for path in sorted(root.rglob("*.parquet"))}
    else:
        names = {path: Path(path.name) for path in paths}
    if not names:
        raise EmbedgeValueError(
            f"inputs: expected Parquet files, found none whose name ends in .parquet in {paths[0] if paths else '[]'}"
        )
    for path, name in names.items():
        if not path.is_file():
            raise EmbedgeError(
                f"inputs: {path}: expected a file or a folder of this machine, found none; of remote files "
                "ray.data.read_parquet makes a dataset for embed_dataset"
            )
        target = output / name
        if target.exists() and target.samefile(path):
            raise EmbedgeValueError(
                f"output: {target} is the input {path} itself, whose texts would be lost; name another folder"
            )
        if target in seen:
            raise EmbedgeValueError(
                f"inputs: {seen[target]} and {path} would both become {target}; give their folder, or rename one"
            )
        seen[target] = path
        yield {"source": str(path.absolute()), "target": str(target)}


def _identity(path: str) -> dict[str, Any]:
    """A file's size and the SHA-256 of its bytes."""
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": sha256}
    except OSError as error:
        raise EmbedgeError(f"{path}: {error.strerror or error}") from error


def _check_unchanged(item: Mapping[str, Any]) -> None:
    """Refuses an input that is no longer what it was when the job was started."""
    now = _identity(item["source"])
    if any(item["made_of"][name] != now[name] for name in now):
        raise EmbedgeError(
            f"{item['source']}: expected the file of the job's start, found that it was written to meanwhile; call "
            "embed_parquet again, which keeps the files that are done"
        )


def _is_done(item: Mapping[str, Any], plan: _Plan) -> bool:
    """Whether the output is there.

    Raises:
        EmbedgeError: it is, and was made of something else.
    """
    target = item["target"]
    if not os.path.lexists(target):
        return False
    advice = "name another output, or delete that file to make it anew"
    found = read_metadata(target)
    made_of = found.get(_SOURCE)
    if made_of is None or "embedge.fingerprint_parts" not in found:
        raise EmbedgeError(f"{target}: expected a file of embed_parquet, found another; {advice}")
    here = item["made_of"]
    if differing := [name for name in here if made_of.get(name) != here[name]]:
        told = "; ".join(f"{n}: {made_of.get(n)!r} then, {here[n]!r} now" for n in differing)
        raise EmbedgeError(f"{target}: was made of something else: {told}; {advice}")
    try:
        plan.check(found["embedge.fingerprint_parts"])
    except EmbedgeError as error:
        raise EmbedgeError(f"{target}: {error}; or {advice}") from error
    return True


def _progress(rows: int, shown: bool | None) -> Progress:
    bar = sys.stderr.isatty() if shown is None else shown
    return Progress(rows, shown=bar, lines=LogLines() if shown is None and not bar else None)


def _load_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EmbedgeImportError(
            f"embedge.integrations.ray needs Ray Data, which cannot be imported ({error}); run "
            f"`{install_command('ray', ['ray[data]'])}`"
        ) from error
    return ray
