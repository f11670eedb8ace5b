"""The ``embedge`` command.

Rules:
    * Exit code 0 for success, 2 for a wrong call, 1 for a failure, 130 when interrupted
      (while this module is imported too, see ``src/embedge``).
    * A subcommand is a module of this folder with ``add_arguments(parser)`` and ``run(args) -> exit
      code``, which is imported when it is called: ``export``, ``bench`` and ``choose`` need extras.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol, cast

from embedge.runtime import __version__
from embedge.runtime.cli.extras import missing_package
from embedge.runtime.cli.messages import failed, report, show_warning
from embedge.runtime.cli.streams import any_streams, drop_output, output_fails
from embedge.runtime.errors import EmbedgeError

__all__ = ["main"]

_COMMANDS = {
    "export": "make a bundle from a model and its task adapters",
    "embed": "turn lines or JSONL into vectors",
    "serve": "answer requests over HTTP, in the form of OpenAI's embeddings",
    "prepare": "pack a bundle's graphs for this machine, and measure what is fastest on it",
    "pretrained": "write a task's graph as a folder for sentence-transformers, optimum and fastembed",
    "pull": "fetch a bundle from the Hugging Face hub, or a part of it",
    "push": "send a bundle to the Hugging Face hub",
    "ranges": "take the ranges of 8-bit vectors from texts, for --output-format int8",
    "subset": "write a smaller bundle of some precisions and tasks",
    "inspect": "show what a bundle holds, and check its files",
    "fit-maps": "fit maps by which one pass gives the vectors of several tasks",
    "families": "list the architectures that can be exported, with a published model of each",
    "bench": "measure quality, latency and memory against the unquantized model",
    "choose": "what of a bundle to run under limits of memory, time, disk and quality",
}
_EXAMPLES = """examples:
  embedge export MODEL --adapter code=FOLDER --precision int8 --out bundle
  embedge embed bundle --task code < lines.txt > vectors.jsonl
  embedge COMMAND --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
        argv: the arguments; ``None``: the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options: dict[str, str] = {}
    with any_streams(), warnings.catch_warnings():
        warnings.showwarning = functools.partial(show_warning, options)
        try:
            code = _run(arguments, options)
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk is an error of the command
            return code
        except SystemExit as stop:  # argparse: --help and wrong calls
            return stop.code if isinstance(stop.code, int) else 2
        except KeyboardInterrupt:
            return failed("interrupted", 130)
        except BrokenPipeError:  # whoever read the output has seen enough
            drop_output()
            return 1
        except Exception as error:
            return report(error, options, output_fails=output_fails())


def _run(arguments: list[str], options: dict[str, str]) -> int:
    """Parses and runs; ``options`` gets the command's option of each argument's name."""
    called = next((word for word in arguments if not word.startswith("-")), None)
    parser = _Parser(
        prog="embedge",
        description="Small, fast ONNX graphs of embedding models, one per task.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    run: Callable[[argparse.Namespace], int] | None = None
    called_parser = parser
    for name, description in _COMMANDS.items():
        subparser = commands.add_parser(name, help=description, description=description)
        if name == called:
            module = _load(name)
            module.add_arguments(subparser)
            options |= subparser.options()
            run, called_parser = module.run, subparser
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        called_parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.version:
        print(f"embedge {__version__}")
        return 0
    if run is None:
        parser.error(f"name a command: {', '.join(_COMMANDS)}")
    return run(args)


class _Help(argparse.HelpFormatter):
    """Leaves the lines of examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"embedge: error: {message}; `{self.prog} --help` lists the options\n")

    def options(self) -> dict[str, str]:
        """Options by the name of what they set: ``--batch-size`` by ``batch_size``."""
        return {a.dest: a.option_strings[-1] for a in self._actions if a.option_strings}


class _Module(Protocol):
    """What the module of a command offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


def _load(command: str) -> _Module:
    """The module of a command.

    Raises:
        EmbedgeImportError: if something that it needs is not installed, with the fix.
    """
    try:
        return cast(
            "_Module", importlib.import_module(f"embedge.runtime.cli.{command.replace('-', '_')}")
        )
    except ImportError as error:
        if isinstance(error, EmbedgeError):
            raise
        raise missing_package(command, error) from error
