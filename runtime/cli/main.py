"""The ``embedge`` command.

Rules:
    * Exit code 0 for success, 2 for a wrong call, 1 for a failure, 130 when interrupted
      (while this module is imported too, see ``src/embedge``).
    * Messages name the command's options where the library's name Python's arguments.
    * Errors and warnings are one line each on standard error, never a traceback; the environment
      variable EMBEDGE_TRACEBACK=1 shows it.
    * Control characters of a file's texts reach no terminal, in messages and tables.
    * What the terminal's encoding does not have is printed as its escape sequence. A closed standard error
      takes everything; files that are opened never get the number of a closed standard stream.
    * ``export`` and ``bench`` belong to other parts of embedge, which are looked up when called:
      each offers ``add_arguments(parser)`` and ``run(args) -> exit code``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TextIO, cast

from embedge.runtime.cli.option_names import OptionNames
from embedge.runtime.cli.printable import printable

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class _Command:
    """Where a subcommand lives, what it does, and the extra that it needs, if any."""

    module: str
    help: str
    extra: str | None = None


_COMMANDS = {
    "export": _Command(
        module="embedge.runtime.cli.export",
        help="make a bundle from a model and its task adapters",
        extra="export",
    ),
    "embed": _Command(
        module="embedge.runtime.cli.embed",
        help="turn lines or JSONL into vectors",
    ),
    "prepare": _Command(
        module="embedge.runtime.cli.prepare",
        help="pack a bundle's graphs for this machine, and measure what is fastest on it",
    ),
    "subset": _Command(
        module="embedge.runtime.cli.subset",
        help="write a smaller bundle of some precisions and tasks",
    ),
    "inspect": _Command(
        module="embedge.runtime.cli.inspect",
        help="show what a bundle holds, and check its files",
    ),
    "bench": _Command(
        module="embedge.runtime.cli.bench",
        help="measure quality, latency and memory against the unquantized model",
        extra="bench",
    ),
}


_SMALLER = "ask for less at once, as with --threads 1 or --max-batch-tokens"
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
    names = OptionNames()
    with _any_streams(), warnings.catch_warnings():
        warnings.showwarning = functools.partial(_show_warning, names)
        try:
            code = _run(arguments, names)
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk is an error of the command
            return code
        except SystemExit as stop:  # argparse: --help and wrong calls
            return stop.code if isinstance(stop.code, int) else 2
        except KeyboardInterrupt:
            return _failed("interrupted", 130)
        except BrokenPipeError:  # whoever read the output has seen enough
            _drop_output()
            return 1
        except Exception as error:
            return _report(error, names, output_fails=_output_fails())


@contextlib.contextmanager
def _any_streams() -> Iterator[None]:
    """Standard streams that take any text, whatever the process was started with."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file would get its number, and libraries' messages
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


def _run(arguments: list[str], names: OptionNames) -> int:
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
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        if name == called:
            module = _load(command)
            module.add_arguments(subparser)
            names.take(subparser)
            run, called_parser = module.run, subparser
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        called_parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.version:
        from embedge.runtime import __version__

        print(f"embedge {__version__}")
        return 0
    if run is None:
        parser.error(f"name a command: {', '.join(_COMMANDS)}")
    return run(args)


def _output_fails() -> bool:
    """Whether standard output takes no more; what is still buffered is then dropped."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _drop_output()
        return True
    return False


def _drop_output() -> None:
    """What is still buffered goes nowhere, so that the interpreter does not complain at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


def _load(command: _Command) -> _Module:
    """The module of a command.

    Raises:
        EmbedgeImportError: if something that it needs is not installed, with the fix.
    """
    from embedge.runtime import EmbedgeError, EmbedgeImportError
    from embedge.runtime.host.install_advice import install_command

    try:
        return cast("_Module", importlib.import_module(command.module))
    except ImportError as error:
        if command.extra is None or isinstance(error, EmbedgeError):
            raise
        name = (error.name or "").partition(".")[0]
        advice = install_command(command.extra, [name] if name else [])
        raise EmbedgeImportError(
            f"`embedge {command.extra}` needs {error.name or error}, which cannot be imported; run "
            f"`{advice}`"
        ) from error


class _Module(Protocol):
    """What the module of a command offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


def _report(error: Exception, names: OptionNames, *, output_fails: bool) -> int:
    """Prints an error as one line; its exit code."""
    if os.environ.get("EMBEDGE_TRACEBACK"):
        traceback.print_exception(error)
    from embedge.runtime import EmbedgeError, EmbedgeValueError, EmbedgeWarning

    if isinstance(error, EmbedgeValueError):
        return _failed(names.put_into(str(error)), 2)
    if isinstance(error, (EmbedgeError, EmbedgeWarning)):  # warnings: as `python -W error` has them
        return _failed(names.put_into(str(error)), 1)
    if isinstance(error, OSError):
        return _failed(_system_error(error, output_fails), 1)
    if isinstance(error, MemoryError):
        return _failed(f"memory ran out{_brackets(error)}; end other programs, or {_SMALLER}", 1)
    if isinstance(error, RuntimeError) and "new thread" in str(error):
        return _failed(f"{error}; allow more processes (`ulimit -u`), or pass --threads 1", 1)
    return _failed(
        f"unexpected {type(error).__name__}: {error} (EMBEDGE_TRACEBACK=1 shows where)", 1
    )


def _brackets(error: Exception) -> str:
    return f" ({error})" if str(error) else ""


def _system_error(error: OSError, output_fails: bool) -> str:
    """What failed and why; standard output's errors have no name."""
    from embedge.runtime.bundle.files import system_reason

    reason = system_reason(error)
    if error.filename is not None:
        return f"{error.filename}: {reason}"
    if output_fails:
        return f"standard output: {reason}; make room, or write to another place"
    return reason if ";" in reason else f"{reason} (EMBEDGE_TRACEBACK=1 shows where)"


def _failed(message: str, code: int) -> int:
    lines = [line.strip() for line in message.splitlines()]
    shown = printable("; ".join(line for line in lines if line))
    print(f"embedge: error: {shown}", file=sys.stderr)
    return code


def _show_warning(
    names: OptionNames,
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = names.put_into(" ".join(str(message).split()))
    print(f"embedge: warning: {printable(text)}", file=sys.stderr)
