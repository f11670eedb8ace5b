"""``embedge embed``: lines, JSONL, CSV or Parquet in, JSONL, CSV, .npy or Parquet out, in bounded memory.

A line of JSONL out is ``{"embedding": […]}``, after the members of the line in, if that was JSONL too:
all but the text, and an ``embedding`` of its own, whose place the vector takes. So it is with the columns of CSV and
Parquet, which carry over into any of the three.

With ``--multi-vector``, and of a late-interaction model, ``embedding`` is a list of vectors, one a token.

Parquet has the vectors' fingerprint in its metadata. The others have no place for it: it goes into a file of its own,
which gets its name after the output has.

With ``--images`` a text is the path of an image, relative to the working folder.

With ``--resume`` the output is made in parts (:mod:`embedge.runtime.cli.parts`), which a killed run leaves.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, get_type_hints

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from embedge.runtime.bundle.files import JSON_BYTES, read_regular_file, system_reason
from embedge.runtime.bundle.json_object import parse_json
from embedge.runtime.cli.parts import open_parts
from embedge.runtime.cli.rows import Rows, SteadyFile, open_rows, parse_shard, shard_of
from embedge.runtime.cli.vector_output import Layout, VectorWriter, open_output, vector_writer
from embedge.runtime.embedder import Embedder
from embedge.runtime.encode.fingerprint import described
from embedge.runtime.encode.request import ON_TRUNCATE, CallOptions
from embedge.runtime.errors import EmbedgeError, EmbedgeValueError, EmbedgeWarning
from embedge.runtime.host.progress import LogLines, Progress
from embedge.runtime.options import EmbedderOptions, EncodeOptions, FingerprintOptions, ImageOptions
from embedge.runtime.scoring.quantization import OUTPUT_FORMATS, code_dtype, code_width
from embedge.runtime.scoring.similarity import TOKEN_KINDS
from embedge.runtime.tables.chunk import EMBEDDING, Chunk, check_kept
from embedge.runtime.tables.parquet_output import read_fingerprint, schema_of

__all__ = ["add_arguments", "run"]

# A chunk is what is read and embedded before the next one is read; it is written meanwhile.
_CHUNK_TEXTS = 1024
_CHUNK_FEW = 64  # images, or texts of a vector a token
_CHUNK_CHARACTERS = 4_000_000
_SHARD = "embedge.shard"  # of Parquet's metadata: which rows of which input
_UNPACK = "unpack it first, e.g. `{} FILE | embedge embed …` with --input-format"
_OTHER_FORMATS = {
    ".json": "write an object a line, e.g. `jq -c '.[]'`, or give --input-format jsonl if it is so",
    ".tsv": "write it with commas as .csv, or give --input-format lines to embed each line as a whole",
    ".gz": _UNPACK.format("zcat"),
    ".zst": _UNPACK.format("zstdcat"),
    ".bz2": _UNPACK.format("bzcat"),
    ".xz": _UNPACK.format("xzcat"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = (
        "Turn lines, JSONL, CSV or Parquet into vectors. They come out as embedding, after the input's own keys or "
        "columns except the text's; an input's embedding is replaced."
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="the bundle's folder")
    add("--task", help="may be left out where the bundle has exactly one")
    add(
        "--precision",
        help="may be left out where the bundle has exactly one; auto: the fastest here under the limits",
    )
    add(
        "--memory-limit", metavar="SIZE",
        help="most bytes of open graphs, e.g. 2.0GB; with --precision auto, of the one to choose",
    )  # fmt: skip
    add(
        "--min-cosine", type=float, metavar="X",
        help="with --precision auto: lowest mean cosine to the unquantized model, as `bench --record` "
        "stored it, e.g. 0.999",
    )  # fmt: skip
    add("--input", default="-", metavar="FILE", help="UTF-8 text; - is standard input (default)")
    add("--output", default="-", metavar="FILE", help="- is standard output (default)")
    add(
        "--input-format", choices=("lines", "jsonl", "csv", "parquet"),
        help="default: what the input's name ends in, .jsonl, .ndjson, .csv or .parquet; jsonl with --field; else a "
        "text per line",
    )  # fmt: skip
    add("--field", help='key of the text in an object (default "text", with --images "image")')
    add("--column", help="likewise the column of CSV or Parquet")
    add(
        "--keep", nargs="*", metavar="NAME",
        help="the other keys or columns to write beside the vectors (default: all)",
    )  # fmt: skip
    add("--images", action="store_true", help="the lines are paths of images, not texts")
    add("--max-pixels", type=int, metavar="N", help="with --images: scale larger ones down to this")
    add(
        "--format", choices=("jsonl", "npy", "csv", "parquet"),
        help="default: what the output's name ends in, .npy, .csv or .parquet, else jsonl",
    )  # fmt: skip
    add(
        "--output-format", choices=OUTPUT_FORMATS, default="float32", metavar="NAME",
        help=f"of vectors: {', '.join(OUTPUT_FORMATS)}; ubinary is binary as unsigned bytes (float32)",
    )  # fmt: skip
    add(
        "--ranges", metavar="FILE",
        help="for int8 and uint8: .npy of the lowest and highest value of each dimension (default: the bundle's)",
    )  # fmt: skip
    add(
        "--pool-factor", type=float, metavar="X",
        help="with vectors a token: join those of a document to about 1/X as many",
    )  # fmt: skip
    add(
        "--shard", metavar="i/n",
        help="embed the i-th of n equal runs of rows of a file; bulk-jobs.md says how outputs are joined",
    )  # fmt: skip
    add(
        "--resume", action="store_true",
        help="keep finished rows in OUTPUT.parts, and go on after them if a run with this option was killed",
    )  # fmt: skip
    add("--prompt-name", metavar="NAME", help="a prompt of the task")
    add(
        "--role", choices=("query", "document"),
        help="embed as encode_query or encode_document do: with that prompt, and the rules of late interaction",
    )  # fmt: skip
    add(
        "--multi-vector", action="store_true",
        help="a vector a token, as JSONL; a late-interaction model gives no others",
    )  # fmt: skip
    add("--truncate-dim", type=int, metavar="N", help="length of the vectors")
    add(
        "--normalize", action="store_true", dest="normalize_embeddings",
        help="L2-normalize in any case",
    )  # fmt: skip
    most = CallOptions.batch_size
    add("--batch-size", type=int, default=most, metavar="N", help=f"most texts ({most})")
    add(
        "--max-batch-tokens", type=int, metavar="N",
        help="most padded tokens of a batch (default: what runs fastest here)",
    )  # fmt: skip
    add(
        "--device", default="auto", metavar="NAME",
        help="cpu, cuda, cuda:N for a GPU's number, or auto (default)",
    )  # fmt: skip
    add("--threads", type=int, metavar="N", help="default: the cores this process really has")
    add(
        "--max-seq-length", type=int, metavar="N",
        help="cut texts at fewer tokens than the model takes",
    )  # fmt: skip
    add(
        "--on-truncate", choices=ON_TRUNCATE,
        help="when a text is longer than the model takes (warn)",
    )  # fmt: skip
    add(
        "--fingerprint", metavar="FILE",
        help="write there, as JSON, of which kind the vectors are; of the formats only parquet has a place for it",
    )  # fmt: skip
    add(
        "--expect", metavar="FINGERPRINT",
        help="embed only if the vectors have it: e1:…, a file that --fingerprint wrote, or a .parquet with vectors",
    )  # fmt: skip
    add("--verify", choices=("none", "size", "full"), default="size")
    add("--verbose", action="store_true", help="say which device and precision were taken")
    add("--quiet", action="store_true", help="do not say how far it is")
    parser.epilog = """examples:
  embedge embed bundle --task code < lines.txt > vectors.jsonl
  embedge embed bundle --input in.jsonl --field text --output vectors.npy
  embedge embed bundle --input in.parquet --output out.parquet --resume
  embedge embed bundle --input in.csv --output 1.parquet --shard 1/4
  ls *.png | embedge embed bundle --images --precision auto > vectors.jsonl
  embedge embed colbert --role document --input in.jsonl --field text > mv.jsonl"""


def run(args: argparse.Namespace) -> int:
    """Embeds the input; nothing is left under the output's name unless all of it was.

    Raises:
        EmbedgeValueError: for a wrong call.
        EmbedgeError: if a line of the input or the bundle cannot be used.
    """
    _check(args)
    if args.verbose:
        logging.basicConfig(format="embedge: %(message)s", level=logging.INFO)
    source_format, column = _input_format(args)
    file_format = args.format or _format_by_name(args.output, ("npy", "csv", "parquet"), "jsonl")
    model = Embedder(args.bundle, **_given(args, EmbedderOptions))
    if model.similarity_fn_name in TOKEN_KINDS:
        _check_late(args)
    args.multi_vector |= model.similarity_fn_name in TOKEN_KINDS
    _check_output(args, file_format)
    options = _given(args, ImageOptions if args.images else EncodeOptions)
    options["multi_vector"] = args.multi_vector
    options["output_format"] = args.output_format
    if args.ranges is not None:
        args.ranges = options["ranges"] = _ranges(args.ranges)
    encode = _encoder(args, model)
    none = encode([], **options)  # a wrong call shows before anything is read
    kind = _kind(args, model, needed=args.resume or file_format == "parquet")
    steady, start, stop, of = _range(args, source_format, column)
    layout = Layout(
        file_format=file_format,
        dim=code_width(args.output_format, kind["parts"]["dim"])
        if kind
        else 0
        if args.multi_vector
        else none.shape[1],
        dtype=np.dtype(code_dtype(args.output_format)).name,
        multi_vector=args.multi_vector,
        kind=kind,
        metadata={_SHARD: {"input_sha256": steady.sha256, "rows": [start, stop], "of": of}}
        if steady and args.shard
        else None,
    )
    embed = partial(_embed, args, partial(_encode, encode, options))
    with ExitStack() as stack:
        if kind is not None and args.fingerprint is not None:  # gets its name after the output
            stack.enter_context(open_output(args.fingerprint)).write(_dumped(kind))
        columns = _first_columns(args, source_format, column, file_format) if start else None
        rows = stack.enter_context(open_rows(args.input, source_format, column, args.keep))
        columns = rows.columns if columns is None else columns
        if steady is not None:
            steady.check()  # what is open now is what was counted
        if args.resume:
            assert steady is not None and stop is not None
            job = _job(args, source_format, column, steady, of)
            parts = stack.enter_context(open_parts(args.output, layout, job, columns, steady.check))
            if parts.rows and not args.quiet:
                print(
                    f"embedge: goes on after {parts.rows:,} of {stop - start:,} rows",
                    file=sys.stderr,
                )
            embed(rows, start + parts.rows, stop, parts)
            steady.check()
            parts.join(stop - start)
        else:
            output = stack.enter_context(open_output(args.output))
            writer = stack.enter_context(vector_writer(output, layout, columns))
            found = embed(rows, start, stop, writer)
            if steady is not None and stop is not None:
                steady.check()
                _check_count(args, found, stop - start)
    return 0


def _check_count(args: argparse.Namespace, found: int, expected: int) -> None:
    if found != expected:
        raise EmbedgeError(
            f"--shard {args.shard}: expected {expected} rows of --input {args.input}, found {found}: the input changed "
            "while it was read; start anew"
        )


def _first_columns(
    args: argparse.Namespace, source_format: str, column: str | None, file_format: str
) -> Any:
    """Of a shard of JSONL the columns that the input's first rows have, so that all shards have the same."""
    if source_format != "jsonl" or file_format not in ("csv", "parquet"):
        return None
    with open_rows(args.input, source_format, column, args.keep) as rows:
        most = max(_chunk(args), args.batch_size)
        chunk = next(rows.chunks(0, None, rows=most, characters=_CHUNK_CHARACTERS), None)
    if chunk is None:  # cut since it was counted, which is noticed next
        return None
    assert not hasattr(chunk.others, "schema")  # of JSONL they are mappings
    if file_format == "parquet":
        return schema_of(chunk.others)
    return [name for name in chunk.others[0] if name != EMBEDDING]


def _embed(
    args: argparse.Namespace,
    encode: Callable[[Chunk], Any],
    rows: Rows,
    start: int,
    stop: int | None,
    writer: VectorWriter,
) -> int:
    """Embeds the rows from ``start`` up to ``stop``, and writes them; says how many came."""
    count = 0
    with ExitStack() as stack:
        bar = sys.stderr.isatty() and not args.quiet
        progress = stack.enter_context(
            Progress(
                None if stop is None else stop - start,
                shown=bar,
                unit="image" if args.images else "text",
                lines=None if bar or args.quiet else LogLines(),
            )
        )
        # Vectors become text while the graph runs the next chunk. Not the other way round: this
        # thread is the one that an interrupt reaches, and a chunk takes longer to embed.
        thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="embedge-write"))
        written: Future[Any] = thread.submit(int)
        for chunk in rows.chunks(
            start, stop, rows=max(_chunk(args), args.batch_size), characters=_CHUNK_CHARACTERS
        ):
            with progress.counts_all():  # as they are embedded, which may take minutes a chunk
                vectors = encode(chunk)
            written.result()
            written = thread.submit(writer.write, chunk.others, vectors)
            count += len(chunk.texts)
        written.result()
    return count


def _range(
    args: argparse.Namespace, source_format: str, column: str | None
) -> tuple[SteadyFile | None, int, int | None, int | None]:
    """The rows to embed, from 0 and up to the second, and how many the input has.

    Without --shard and --resume the input is read once, to its end, wherever that is.
    """
    if args.shard is None and not args.resume:
        return None, 0, None, None
    steady = SteadyFile(args.input, "--resume" if args.resume else "--shard")
    with open_rows(args.input, source_format, column, args.keep) as rows:
        count = rows.count()
    steady.check()
    return steady, *shard_of(count, parse_shard(args.shard or "1/1")), count


def _job(
    args: argparse.Namespace,
    source_format: str,
    column: str | None,
    steady: SteadyFile,
    rows: int | None,
) -> dict[str, Any]:
    """What rows depend on besides the vectors' kind."""
    return {
        "input": steady.sha256,
        "rows": rows,
        "input_format": source_format,
        "column": column,
        "keep": args.keep,
        "shard": args.shard,
    }


def _input_format(args: argparse.Namespace) -> tuple[str, str | None]:
    """The input's format, and where its texts are; ``None`` for lines."""
    if args.field is not None:
        return "jsonl", args.field
    found: str = args.input_format or _format_of_input(args.input)
    if found == "lines":
        return found, None
    return found, args.column or ("image" if args.images else "text")


def _format_of_input(name: str) -> str:
    """What a name's end says.

    Raises:
        EmbedgeValueError: it says that neither lines nor another format of ``--input-format`` is in the file.
    """
    end = os.path.splitext(name)[1].lower()
    if end in _OTHER_FORMATS:
        raise EmbedgeValueError(
            f"--input {name}: expected lines, JSONL (.jsonl, .ndjson), CSV (.csv) or Parquet (.parquet), found a name "
            f"that ends in {end}; {_OTHER_FORMATS[end]}"
        )
    return _format_by_name(name, ("jsonl", "ndjson", "csv", "parquet"), "lines").replace(
        "ndjson", "jsonl"
    )


def _format_by_name(name: str, formats: Sequence[str], otherwise: str) -> str:
    end = os.path.splitext(name)[1].lower()
    return next((f for f in formats if end == f".{f}"), otherwise)


def _check(args: argparse.Namespace) -> None:
    """Refuses options that do not go together."""
    _check_input(args)
    _check_reading(args)
    for name in ("prompt_name", "role", "max_batch_tokens", "on_truncate"):
        if args.images and getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise EmbedgeValueError(f"--{option} is for texts; leave it out with --images")
    if args.max_pixels is not None and not args.images:
        raise EmbedgeValueError("--max-pixels goes with --images")
    if args.fingerprint == "-" or (
        args.fingerprint is not None
        and os.path.realpath(args.fingerprint) in map(os.path.realpath, (args.input, args.output))
    ):
        raise EmbedgeValueError(
            f"--fingerprint {args.fingerprint}: expected a file of its own, beside the input and the output"
        )
    if "-" not in (args.input, args.output) and _are_one_file(args.input, args.output):
        raise EmbedgeValueError(
            f"--output {args.output} is the input, whose texts would be lost; name another file"
        )


def _check_input(args: argparse.Namespace) -> None:
    """Refuses what does not go with the input's format."""
    source_format, column = _input_format(args)
    if args.field is not None and args.input_format not in (None, "jsonl"):
        other = "" if args.input_format == "lines" else ", or name the column with --column"
        raise EmbedgeValueError(
            f"--field is for JSONL; leave out --input-format {args.input_format}{other}"
        )
    if args.field is not None and args.column is not None:
        raise EmbedgeValueError("--field is for JSONL, --column for CSV and Parquet; give one")
    if args.column is not None and source_format not in ("csv", "parquet"):
        other = "--field" if source_format == "jsonl" else "--input-format csv"
        raise EmbedgeValueError(
            f"--column is for CSV and Parquet, and the input is {source_format}; give {other}"
        )
    if args.keep and source_format == "lines":
        raise EmbedgeValueError(
            "--keep: lines have nothing to keep beside their text; leave it out"
        )
    if column is not None:
        check_kept(args.keep, column)


def _check_reading(args: argparse.Namespace) -> None:
    """Refuses --shard and --resume where the input cannot be read twice, or the output be made in parts."""
    if args.shard is not None:
        parse_shard(args.shard)
    for option in ("shard", "resume"):
        if getattr(args, option) and args.input == "-":
            raise EmbedgeValueError(
                f"--{option}: the input is read twice, which a pipe cannot be; expected --input FILE"
            )
    if args.resume and (args.output == "-" or not _can_be_named(args.output)):
        raise EmbedgeValueError(
            f"--resume: the output is made in parts beside its file; expected --output FILE, found {args.output}"
        )
    if args.resume and args.images:
        raise EmbedgeValueError(
            "--resume: whether images have changed since is not looked at; leave it out with --images, and take "
            "--shard for smaller runs"
        )


def _check_output(args: argparse.Namespace, file_format: str) -> None:
    """Refuses what the output's format has no place for."""
    if args.multi_vector and file_format == "npy":
        raise EmbedgeValueError(
            "--format npy: texts differ in their number of vectors, and .npy has rows of one length; expected "
            "--format jsonl, or a name of the output that does not end in .npy"
        )
    if args.keep and file_format == "npy":
        raise EmbedgeValueError("--keep: .npy has vectors alone; leave it out, or write parquet")


def _can_be_named(name: str) -> bool:
    """Whether a file under this name can be replaced: a device or a pipe cannot."""
    return not os.path.exists(name) or os.path.isfile(name)


def _check_late(args: argparse.Namespace) -> None:
    """Refuses what a late-interaction model has no vectors for."""
    if args.role is None:
        raise EmbedgeValueError(
            f"{args.bundle}: a late-interaction model, whose queries and documents differ; expected --role query or "
            "--role document"
        )


def _encoder(args: argparse.Namespace, model: Embedder) -> Callable[..., Any]:
    """The method that embeds the input."""
    if args.images:
        return model.encode_image
    by_role = {"query": model.encode_query, "document": model.encode_document}
    return model.encode if args.role is None else by_role[args.role]


def _chunk(args: argparse.Namespace) -> int:
    """How many items are held at once with their vectors, at least."""
    return _CHUNK_FEW if args.images or args.multi_vector else _CHUNK_TEXTS


def _kind(args: argparse.Namespace, model: Embedder, *, needed: bool) -> dict[str, Any] | None:
    """Of which kind the vectors are, checked against what is expected; ``None`` where nobody asks."""
    if args.fingerprint is None and args.expect is None and not needed:
        return None
    options = _given(args, FingerprintOptions)
    if args.images:
        options["prompt"] = ""
    if args.expect is not None:
        model.check_fingerprint(_expected(args.expect), **options)
    return described(model.fingerprint_parts(**options))


def _ranges(name: str) -> NDArray[Any]:
    """The array in a .npy file."""
    try:
        with open(name, "rb") as file:
            found: NDArray[Any] = npy_format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        reason = system_reason(error) if isinstance(error, OSError) else error
        raise EmbedgeError(
            f"--ranges {name}: expected a .npy file of floats [2, dim]: {reason}; np.save writes what "
            "ranges_of(vectors) gives"
        ) from error
    return found


def _dumped(kind: Mapping[str, Any]) -> bytes:
    return json.dumps(kind, indent=2).encode() + b"\n"


def _expected(text: str) -> str | dict[str, Any]:
    """A fingerprint, or what a file has."""
    if re.match(r"e[0-9]+:", text):
        return text
    if text.endswith(".parquet"):
        return read_fingerprint(text)
    try:
        found = parse_json(read_regular_file(text, JSON_BYTES))
    except (OSError, ValueError) as error:
        raise EmbedgeError(
            f"--expect {text}: expected e1:… or a file that --fingerprint wrote: {system_reason(error)}"
        ) from error
    return found if isinstance(found, dict) else str(found)


def _given(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The options that were given, of those that a class lists."""
    values = {name: getattr(args, name, None) for name in get_type_hints(kind)}
    return {name: value for name, value in values.items() if value is not None}


def _encode(encode: Callable[..., Any], options: Mapping[str, Any], chunk: Chunk) -> Any:
    """Vectors of some rows; one that cannot be embedded is a failure, not a wrong call.

    Warnings and errors name lines or rows of the input, not indices in the call.
    """

    def in_lines(message: object) -> str:
        return re.sub(
            r"(?:inputs|images)\[(\d+)\]",
            lambda index: f"input {chunk.unit} {chunk.numbers[int(index[1])]}",
            str(message),
        )

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            vectors = encode(list(chunk.texts), **options)
    except EmbedgeValueError as error:
        raise EmbedgeError(in_lines(error), arguments=error.arguments) from error
    for warning in said:
        message: Warning | str = in_lines(warning.message)
        if isinstance(warning.message, EmbedgeWarning):
            message = EmbedgeWarning(message, arguments=warning.message.arguments)
        warnings.warn(message, warning.category, stacklevel=2)
    return vectors


def _are_one_file(one: str, other: str) -> bool:
    try:
        return os.path.isfile(one) and os.path.samefile(one, other)
    except OSError:  # neither is there yet, or the one that is missing is named later
        return False
