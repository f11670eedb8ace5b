"""Debian package descriptions: a one-line synopsis and a long description per package."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from textsplit import squeeze


@dataclass(frozen=True)
class Package:
    """One binary package.

    Attributes:
        name: Binary package name.
        source: Source package name; the unit of the train/held-out split.
        section: Debian section, e.g. ``"science"``.
        synopsis: The one-line description.
        description: The paragraphs of the long description, joined by line feeds.
    """

    name: str
    source: str
    section: str
    synopsis: str
    description: str


def _fields(stanza: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.split("\n"):
        if line[:1] in (" ", "\t"):
            fields[name] += "\n" + line
        elif ":" in line:
            name, value = line.split(":", 1)
            fields[name] = value.strip()
    return fields


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    for stanza in text.split("\n\n"):
        if stanza.strip():
            yield _fields(stanza.strip("\n"))


def _long_description(value: str) -> str:
    paragraphs: list[str] = []
    words: list[str] = []
    for line in value.split("\n")[1:]:
        if line.strip() == ".":
            paragraphs.append(" ".join(words))
            words = []
        else:
            words.append(line.strip())
    paragraphs.append(" ".join(words))
    return "\n".join(squeeze(paragraph) for paragraph in paragraphs if paragraph.strip())


def _apt(folder: Path, *command: str) -> str:
    options = ["-o", f"Dir::State::Lists={folder}", "-o", "Acquire::Languages=en"]
    run = subprocess.run(
        [command[0], *options, *command[1:]], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise RuntimeError(
            f"package lists: expected `{' '.join(command)}` to succeed, it ended with "
            f"{run.returncode}: {run.stderr.strip()[-300:]}; run this on a Debian machine that "
            "can reach its package mirror"
        )
    return run.stdout


def read_packages(folder: Path) -> list[Package]:
    """Return every package of the machine's Debian release with its English descriptions.

    Args:
        folder: Where apt keeps this program's own copy of the lists; filled once, so that the
            machine's own lists stay as they are.
    """
    lists = folder.resolve()
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    if not list(lists.glob("*_Translation-en*")):
        _apt(lists, "apt-get", "update")
    longs: dict[str, str] = {}
    for path in sorted(lists.glob("*_Translation-en*")):
        text = _apt(lists, "/usr/lib/apt/apt-helper", "cat-file", str(path))
        for fields in _stanzas(text):
            longs[fields["Description-md5"]] = _long_description(fields.get("Description-en", ""))
    packages: dict[str, Package] = {}
    for fields in _stanzas(_apt(lists, "apt-cache", "dumpavail")):
        description = longs.get(fields.get("Description-md5", ""), "")
        name = fields["Package"]
        if description and name not in packages:
            packages[name] = Package(
                name=name,
                source=fields.get("Source", name).split(" ")[0],
                section=fields.get("Section", "misc").split("/")[-1],
                synopsis=re.sub(r"\s+", " ", fields["Description"].split("\n")[0]),
                description=description,
            )
    return [packages[name] for name in sorted(packages)]
