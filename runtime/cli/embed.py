"""``embedge embed``: lines or JSONL in, JSONL or .npy out, in bounded memory.

A line of JSONL out is ``{"embedding": […]}``, after the members of the line in, if that was JSONL too:
all but the text, and an ``embedding`` of its own, whose place the vector takes.

With ``--multi-vector``, and of a late-interaction model, ``embedding`` is a list of vectors, one a token.

Neither format has a place for the vectors' fingerprint: it goes into a file of its own, which gets its name after the
output has.

With ``--images`` a line is the path of an image, relative to the working folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, BinaryIO, get_type_hints

from embedge.runtime.bundle.files import JSON_BYTES, read_regular_file, system_reason
from embedge.runtime.bundle.json_object import parse_json
from embedge.runtime.cli.text_input import Record, chunked, read_records
from embedge.runtime.cli.vector_output import open_output, vector_writer
from embedge.runtime.embedder import Embedder
from embedge.runtime.encode.fingerprint import described
from embedge.runtime.encode.request import ON_TRUNCATE, CallOptions
from embedge.runtime.errors import EmbedgeError, EmbedgeValueError, EmbedgeWarning
from embedge.runtime.host.progress import LogLines, Progress
from embedge.runtime.options import EmbedderOptions, EncodeOptions, FingerprintOptions, ImageOptions
from embedge.runtime.scoring.similarity import TOKEN_KINDS

__all__ = ["add_arguments", "run"]

# A chunk is what is read and embedded before the next one is read; it is written meanwhile.
_CHUNK_TEXTS = 1024
_CHUNK_FEW = 64  # images, or texts of a vector a token
_CHUNK_CHARACTERS = 4_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = (
        "Turn lines or JSONL into vectors, one a line. JSONL has them under the key embedding, after the "
        "input's own keys except the text's; an input key embedding is replaced."
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
        "--input-format", choices=("lines", "jsonl"),
        help="a text per line (default), or a JSON object per line (default with --field)",
    )  # fmt: skip
    add("--field", help='key of the text in an object (default "text", with --images "image")')
    add("--images", action="store_true", help="the lines are paths of images, not texts")
    add("--max-pixels", type=int, metavar="N", help="with --images: scale larger ones down to this")
    add(
        "--format", choices=("jsonl", "npy"),
        help="default: npy where the output's name ends in .npy, else jsonl",
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
        "--on-truncate", choices=ON_TRUNCATE,
        help="when a text is longer than the model takes (warn)",
    )  # fmt: skip
    add(
        "--fingerprint", metavar="FILE",
        help="write there, as JSON, of which kind the vectors are; neither JSONL nor .npy has a place for it",
    )  # fmt: skip
    add(
        "--expect", metavar="FINGERPRINT",
        help="embed only if the vectors have it: e1:…, or a file that --fingerprint wrote",
    )  # fmt: skip
    add("--verify", choices=("none", "size", "full"), default="size")
    add("--verbose", action="store_true", help="say which device and precision were taken")
    add("--quiet", action="store_true", help="do not say how far it is")
    parser.epilog = """examples:
  embedge embed bundle --task code < lines.txt > vectors.jsonl
  embedge embed bundle --input in.jsonl --field text --output vectors.npy
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
    jsonl = args.field is not None or args.input_format == "jsonl"
    field = (args.field or ("image" if args.images else "text")) if jsonl else None
    file_format = args.format or ("npy" if args.output.endswith(".npy") else "jsonl")
    model = Embedder(args.bundle, **_given(args, EmbedderOptions))
    if model.similarity_fn_name in TOKEN_KINDS:
        _check_late(args)
    args.multi_vector |= model.similarity_fn_name in TOKEN_KINDS
    if args.multi_vector and file_format == "npy":
        raise EmbedgeValueError(
            "--format npy: texts differ in their number of vectors, and .npy has rows of one length; expected "
            "--format jsonl, or a name of the output that does not end in .npy"
        )
    options = _given(args, ImageOptions if args.images else EncodeOptions)
    options["multi_vector"] = args.multi_vector
    encode = _encoder(args, model)
    none = encode([], **options)  # a wrong call shows before anything is read
    dim = 0 if args.multi_vector else none.shape[1]
    kind = _kind(args, model)
    with ExitStack() as stack:
        if kind is not None and args.fingerprint is not None:  # gets its name after the output
            stack.enter_context(open_output(args.fingerprint)).write(_dumped(kind))
        source = stack.enter_context(_open_input(args.input)) if args.input != "-" else _stdin()
        output = stack.enter_context(open_output(args.output))
        writer = stack.enter_context(vector_writer(output, file_format, dim))
        unit = "image" if args.images else "text"
        bar = sys.stderr.isatty() and not args.quiet
        lines = None if bar or args.quiet else LogLines()
        progress = stack.enter_context(Progress(None, shown=bar, unit=unit, lines=lines))
        # Vectors become text while the graph runs the next chunk. Not the other way round: this
        # thread is the one that an interrupt reaches, and a chunk takes longer to embed.
        thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="embedge-write"))
        written: Future[Any] = thread.submit(int)
        for records in chunked(
            read_records(source, field),
            texts=max(_chunk(args), args.batch_size),
            characters=_CHUNK_CHARACTERS,
        ):
            with progress.counts_all():  # as they are embedded, which may take minutes a chunk
                vectors = _encode(encode, records, options)
            written.result()
            written = thread.submit(writer.write, [record.others for record in records], vectors)
        written.result()
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses options that do not go together."""
    if args.field is not None and args.input_format == "lines":
        raise EmbedgeValueError("--field is for JSONL; leave out --input-format lines")
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


def _kind(args: argparse.Namespace, model: Embedder) -> dict[str, Any] | None:
    """Of which kind the vectors are, checked against what is expected; ``None`` where nobody asks."""
    if args.fingerprint is None and args.expect is None:
        return None
    options = _given(args, FingerprintOptions)
    if args.images:
        options["prompt"] = ""
    if args.expect is not None:
        model.check_fingerprint(_expected(args.expect), **options)
    return described(model.fingerprint_parts(**options))


def _dumped(kind: Mapping[str, Any]) -> bytes:
    return json.dumps(kind, indent=2).encode() + b"\n"


def _expected(text: str) -> str | dict[str, Any]:
    """A fingerprint, or what a file has."""
    if re.match(r"e[0-9]+:", text):
        return text
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


def _encode(encode: Callable[..., Any], records: list[Record], options: Mapping[str, Any]) -> Any:
    """Vectors of some records; one that cannot be embedded is a failure, not a wrong call.

    Warnings and errors name lines of the input, not indices in the call.
    """

    def in_lines(message: object) -> str:
        return re.sub(
            r"(?:inputs|images)\[(\d+)\]",
            lambda index: f"input line {records[int(index[1])].line}",
            str(message),
        )

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            vectors = encode([record.text for record in records], **options)
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


def _open_input(name: str) -> BinaryIO:
    try:
        return open(name, "rb")
    except OSError as error:
        raise EmbedgeError(f"--input {name}: {error.strerror or error}") from error


def _stdin() -> BinaryIO:
    if sys.stdin is None:
        raise EmbedgeError("standard input is closed; name a file with --input FILE")
    if sys.stdin.buffer.isatty():
        print("embedge: reads lines from the terminal; Ctrl-D ends them", file=sys.stderr)
    return sys.stdin.buffer
