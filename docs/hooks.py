"""What the documentation site needs beside its pages; as a program it writes the pages that are made from the code.

    python docs/hooks.py     # writes the pages of MADE anew

Rules:
    * Documents of the repository's root are pages below ``project/``.
    * A link to a file that is no page becomes its text: the site holds no sources.
    * tests/test_documents.py compares the pages that are made with what is there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PROJECT = "project/"
ROOT_PAGES = (
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "examples/README.md",
)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)


# -- hooks of mkdocs --------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Adds the documents of the root."""
    from mkdocs.structure.files import File

    for name in ROOT_PAGES:
        text = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, PROJECT + name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads links from where a page lies in the repository to where it lies on the site."""
    uri = page.file.src_uri
    origin = ROOT / uri.removeprefix(PROJECT) if uri.startswith(PROJECT) else DOCS / uri
    parts: list[str] = []
    end = 0
    for fence in FENCE.finditer(markdown):
        parts += [_moved(markdown[end : fence.start()], origin, uri), fence[0]]
        end = fence.end()
    text = "".join([*parts, _moved(markdown[end:], origin, uri)])
    return f"{_back(page.meta)}\n\n{text}" if "number" in page.meta else text


def _back(note: Any) -> str:
    """The line above a lab note, which the navigation does not list."""
    return f"[Lab notes](index.md) · {note['number']} · {note['date']}"


def _moved(text: str, origin: Path, uri: str) -> str:
    def move(link: re.Match[str]) -> str:
        image, label, target = link.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return link[0]
        place = Path(os.path.normpath(origin.parent / path))
        if place.is_relative_to(DOCS):
            there = place.relative_to(DOCS).as_posix()
        elif place.relative_to(ROOT).as_posix() in ROOT_PAGES:
            there = PROJECT + place.relative_to(ROOT).as_posix()
        elif place == ROOT / "README.md":
            there = "index.md"
        else:
            return label
        relative = os.path.relpath(there, os.path.dirname(uri) or ".")
        return f"{image}[{label}]({relative}{'#' + anchor if anchor else ''})"

    return LINK.sub(move, text)


# -- pages that are made ----------------------------------------------------------------------------


def command_line() -> str:
    """The page of the command's options."""
    lines = [
        "# Command line",
        "",
        "`embedge COMMAND`, or `python -m embedge COMMAND` where the script is not on the path.",
        "",
        "- Exit codes: 0 for success, 1 for a failure, 2 for a wrong call, 130 after Ctrl-C.",
        "- An error is one line on standard error. `EMBEDGE_TRACEBACK=1` shows where it was raised.",
        "- `EMBEDGE_KERNELS=onnxruntime` leaves embedge's own [kernels](../explanation/kernels.md) out; `avx2`,",
        "  `avx-vnni` or `avx512-vnni` chooses their instruction set.",
        "",
        "This page is made from the command's own help by `python docs/hooks.py`.",
    ]
    from embedge.runtime.cli.main import _COMMANDS

    for name, purpose in _COMMANDS.items():
        lines += ["", *_command(name, purpose)]
    return "\n".join(lines) + "\n"


def _command(name: str, purpose: str) -> Iterator[str]:
    module = importlib.import_module(f"embedge.runtime.cli.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(prog=f"embedge {name}", add_help=False)
    module.add_arguments(parser)
    actions = parser._actions
    named = [action for action in actions if action.option_strings]
    places = " ".join(_metavar(action) for action in actions if not action.option_strings)
    yield f"## embedge {name}"
    yield ""
    yield from _wrapped(_sentence(parser.description or purpose))
    yield ""
    yield "```text"
    yield f"embedge {name} [options] {places}".rstrip()
    yield "```"
    yield ""
    for action in [a for a in actions if not a.option_strings] + named:
        yield from _wrapped(_entry(action), first="- ", rest="  ")
    examples = (parser.epilog or "").removeprefix("examples:").rstrip().splitlines()
    if any(examples):
        yield ""
        yield "<!-- not run: the guides run their like -->"
        yield "```sh"
        yield from (line.strip() for line in examples if line.strip())
        yield "```"


def _entry(action: argparse.Action) -> str:
    names = [name for name in action.option_strings if name.startswith("--")]
    shown = " ".join([*names[:1], _metavar(action)]).strip()
    help_text = (action.help or "") % {**vars(action), "prog": "embedge"} if action.help else ""
    text = f"**`{shown}`**"
    if help_text:
        text += f": {help_text}"
    if action.choices:
        text += f"{';' if help_text else ':'} one of " + ", ".join(f"`{c}`" for c in action.choices)
    return text + ("; required" if action.required and action.option_strings else "")


def _metavar(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    name = action.metavar or action.dest.upper()
    return f"{name} [{name} ...]" if action.nargs in ("+", "*") else str(name)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    import textwrap

    return textwrap.wrap(
        text,
        width=118,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def notes() -> list[tuple[Path, dict[str, str]]]:
    """Every lab note with what stands before its text, newest first."""
    found = [(path, front_matter(path)) for path in (DOCS / "lab-notes").glob("[0-9]*.md")]
    return sorted(found, key=lambda note: int(note[1]["number"]), reverse=True)


def front_matter(path: Path) -> dict[str, str]:
    """The lines ``key: value`` between two lines of dashes at a note's start."""
    text = path.read_text("utf-8")
    _, before, after = text.split("---\n", 2)
    values = {
        key: value.strip('"')
        for key, value in (line.split(": ", 1) for line in before.splitlines())
    }
    values["heading"] = next(line for line in after.splitlines() if line.startswith("# "))[2:]
    return values


def lab_notes() -> str:
    """The page that lists the lab notes."""
    lines = [
        "# Lab notes",
        "",
        "Each note has a question, a set-up, a result, and what was decided. Failures stay in. Paths and",
        "names in a note are those of its day; the [glossary](../glossary.md) says how they are called now.",
        "",
        "- *kept*: the code works so. *dropped*: tried, and not taken. *measured*: nothing to decide.",
        '- "Busy" means that another job held the processor. Ratios of alternating runs are usable',
        "  then, times are not.",
        '- Numbers stay: "lab note 49" in code and documents is the note of that number here.',
        "",
        "## Newest first",
        "",
    ]
    for path, note in notes():
        number, when, question = note["number"], note["date"], note["question"]
        entry = f"**{number}** · {when} · [{question}]({path.name}) *{note['decision']}*"
        lines += _wrapped(entry, first="- ", rest="  ")
    return "\n".join(lines) + "\n"


def supported_models() -> str:
    """The page of the architectures that can be exported."""
    from embedge.export.families.supported import supported

    lines = [
        "# Supported models",
        "",
        "`embedge families` prints this list, `embedge families --json` for programs. The name of an",
        "architecture is `model_type` in config.json; jina's are told by their class or name as well. A model is",
        "an example: others of its architecture run too, and fine-tunes of it with their adapters.",
        "",
        "| architecture | example |",
        "|---|---|",
        *(f"| `{one.architecture}` | {one.example} |" for one in supported()),
        "",
        "[What can be exported](../guides/what-can-be-exported.md) has what a model may bring besides. A model of",
        "another architecture is refused with the name of the closest one here. Adding an architecture costs one",
        "file: see [contributing](../../CONTRIBUTING.md#where-do-i-add-a-family).",
        "",
        "This page is made from the families by `python docs/hooks.py`.",
    ]
    return "\n".join(lines) + "\n"


MADE = {
    "reference/command-line.md": command_line,
    "reference/supported-models.md": supported_models,
    "lab-notes/index.md": lab_notes,
}

if __name__ == "__main__":
    for page, make in MADE.items():
        (DOCS / page).write_text(make(), "utf-8")
