"""``embedge serve``: bundles over HTTP."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from embedge.runtime.arguments import check_positive
from embedge.runtime.bundle.files import JSON_BYTES, read_regular_file, system_reason
from embedge.runtime.cli.extras import missing_package
from embedge.runtime.cli.streams import drop_output
from embedge.runtime.errors import EmbedgeError, EmbedgeValueError, warn
from embedge.runtime.host.memory import parse_bytes
from embedge.runtime.server.limits import Limits

__all__ = ["add_arguments", "run"]

_KEY_VARIABLE = "EMBEDGE_API_KEY"
_PORT = 8000
_STOP_SECONDS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = (
        "Answer requests over HTTP in the form of OpenAI's embeddings, and of rerankers. A request names the bundle "
        "and the task: NAME:TASK, or NAME@PRECISION:TASK. SIGHUP opens bundles that were replaced; SIGTERM answers "
        "what is under way, and ends."
    )
    add = parser.add_argument
    most = Limits()
    add(
        "bundles", nargs="+", metavar="BUNDLE",
        help="a bundle's folder, which clients call by the folder's name; NAME=FOLDER calls it NAME",
    )  # fmt: skip
    add(
        "--precision", nargs="+", metavar="P",
        help="serve these, not auto; requests that name none get the first. Needless where a bundle has exactly one",
    )  # fmt: skip
    add(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="to listen at; the default is reached from this machine alone, 0.0.0.0 from all",
    )  # fmt: skip
    add("--port", type=int, default=_PORT, metavar="N", help=f"0 for any that is free ({_PORT})")
    add(
        "--api-key-file", metavar="FILE",
        help=f"a key a line, one of which requests have to carry; or the variable {_KEY_VARIABLE}",
    )  # fmt: skip
    add(
        "--device", default="auto", metavar="NAME",
        help="cpu, cuda, cuda:N for a GPU's number, or auto (default)",
    )  # fmt: skip
    add("--threads", type=int, metavar="N", help="default: the cores this process really has")
    add(
        "--memory-limit", metavar="SIZE",
        help="most bytes of open graphs of each bundle and precision, e.g. 2.0GB",
    )  # fmt: skip
    add("--verify", choices=("none", "size", "full"), default="size")
    add(
        "--max-body", default=f"{most.max_body >> 20}MiB", metavar="SIZE",
        help=f"of a request ({most.max_body >> 20}MiB)",
    )  # fmt: skip
    add(
        "--max-inputs", type=int, default=most.max_inputs, metavar="N",
        help=f"most texts and images of a request ({most.max_inputs})",
    )  # fmt: skip
    add(
        "--max-request-tokens", type=int, default=most.max_request_tokens, metavar="N",
        help=f"most tokens of a request, 1024 for an image ({most.max_request_tokens})",
    )  # fmt: skip
    add(
        "--max-queued-tokens", type=int, default=most.max_queued_tokens, metavar="N",
        help=f"most tokens that wait or run; more are answered by 429 ({most.max_queued_tokens})",
    )  # fmt: skip
    add(
        "--max-requests", type=int, default=most.max_requests, metavar="N",
        help=f"most requests at once; more are answered by 429 ({most.max_requests})",
    )  # fmt: skip
    add(
        "--timeout", type=int, default=most.timeout, metavar="SECONDS",
        help=f"for a request, from its arrival to its answer; and for the client to take that ({most.timeout})",
    )  # fmt: skip
    add(
        "--stop-timeout", type=int, default=_STOP_SECONDS, metavar="SECONDS",
        help=f"for requests under way at the end ({_STOP_SECONDS})",
    )  # fmt: skip
    parser.epilog = """examples:
  embedge serve bundle --precision int8
  embedge serve small=bundles/minilm large=bundles/v4 --precision int8 int4 --port 9000
  curl http://127.0.0.1:8000/v1/embeddings -H 'Content-Type: application/json' \\
    -d '{"model": "bundle:code", "input": "how do I sort a dict"}'"""


def run(args: argparse.Namespace) -> int:
    """Serves until a signal ends it.

    Raises:
        EmbedgeValueError: for a wrong call.
        EmbedgeImportError: if a package of the extra is missing.
        EmbedgeError: if a bundle cannot be opened, or the address not be listened at.
    """
    try:
        from embedge.runtime.server.app import Service
        from embedge.runtime.server.hosts import is_loopback
        from embedge.runtime.server.keys import Keys
        from embedge.runtime.server.models import Models, source_of
        from embedge.runtime.server.process import bound, run, url_of
    except ImportError as error:
        if isinstance(error, EmbedgeError):
            raise
        raise missing_package("serve", error) from error
    # Requests come one by one, and to wake the tokenizers' threads for a text takes longer than to read it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    limits = Limits(
        max_body=parse_bytes("max_body", args.max_body),
        max_inputs=args.max_inputs,
        max_request_tokens=args.max_request_tokens,
        max_queued_tokens=args.max_queued_tokens,
        max_requests=args.max_requests,
        timeout=args.timeout,
    )
    check_positive("stop_timeout", args.stop_timeout)
    keys = Keys(_keys(args.api_key_file))
    local = is_loopback(args.host)
    sources = [source_of(argument) for argument in args.bundles]
    logging.basicConfig(format="embedge: %(message)s", level=logging.WARNING)
    logging.getLogger("embedge.server").setLevel(logging.INFO)
    # It warns of each request that is no HTTP, by which a stranger could fill the disk.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    with bound(args.host, args.port) as listener:
        if not local and not keys:
            warn(f"--host {args.host}: any machine that reaches it may use it; set --api-key-file")
        models = Models(
            sources,
            precisions=args.precision or (None,),
            options={
                "device": args.device,
                "threads": args.threads,
                "memory_limit": args.memory_limit,
                "verify": args.verify,
            },
        )
        service = Service(models, limits=limits, keys=keys, local=local and not keys)
        url = url_of(listener)
        run(
            service,
            listener,
            stop_seconds=args.stop_timeout,
            started=lambda: _announce(url),
        )
    return 0


def _announce(url: str) -> None:
    """Says where the server listens; what it serves does not depend on a place for that."""
    try:
        print(f"embedge: listening at {url}", flush=True)
    except OSError as error:  # a full disk, a pipe that nobody reads
        drop_output()
        logging.getLogger("embedge.server").warning(
            "listening at %s, which could not be written: %s", url, system_reason(error)
        )


def _keys(file: str | None) -> list[str]:
    """The keys of a file or of the environment; none: the server is open.

    Raises:
        EmbedgeValueError: for both, for a file without a key, or with one that a header cannot carry.
        EmbedgeError: if the file cannot be read.
    """
    variable = os.environ.get(_KEY_VARIABLE)
    if file is None:
        keys, where = ([] if variable is None else [variable]), _KEY_VARIABLE
    elif variable is not None:
        raise EmbedgeValueError(
            f"--api-key-file and {_KEY_VARIABLE} both give keys; set one of them"
        )
    else:
        where = file
        try:
            text = read_regular_file(Path(file), JSON_BYTES).decode()
        except OSError as error:
            raise EmbedgeError(f"{file}: cannot be read: {system_reason(error)}") from error
        except UnicodeDecodeError as error:
            raise EmbedgeValueError(
                f"{file}: expected a key a line, found no UTF-8 text"
            ) from error
        keys = [line.strip() for line in text.splitlines() if line.strip()]
        if not keys:
            raise EmbedgeValueError(f"{file}: expected a key a line, found none")
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise EmbedgeValueError(
                f"{where}: expected keys of printable ASCII without spaces, found another; make one, such as by "
                "`openssl rand -hex 32`"
            )
    return keys
