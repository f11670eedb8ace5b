"""Mutations of files: bytes, JSON, safetensors, and what may lie under a name instead of a file.

Everything is drawn from one ``random.Random``, so a seed gives the same mutation again.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

__all__ = ["mutate_bytes", "mutate_file", "mutate_json", "mutate_json_text", "mutate_safetensors"]

_NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 64, 255, 256, 1 << 16, 1 << 31, (1 << 31) - 1, 1 << 32, (1 << 63) - 1),
    *(1 << 63, 1 << 64, 10**30, -(10**30), 10**400, 0.0, -0.0, 0.5, 1e-300, 1e300, -1e300),
    *(float("nan"), float("inf"), float("-inf")),
]
_TEXTS: list[Any] = [
    *("", " ", "a", "0", "-1", "true", "null", "None", ".", "..", "../x", "/etc/passwd", "C:\\x"),
    *("a/../../b", "~", "\0", "\ud800", "\u202e", "é" * 300, "x" * 70_000, "%s%n", "{}", "$HOME"),
    *("model.safetensors", "config.json", "(", "[", "(a+)+$", ".*", "\n", "mean", "cls", "base"),
]
_OTHERS: list[Any] = [None, True, False, [], {}, [[]], [None], {"a": 1}, {"": {}}, [0] * 100]


def mutate_json(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy of parsed JSON with one change, and what was changed."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return rng.choice([*_OTHERS, *_NUMBERS, *_TEXTS]), "the whole document replaced"
    holder, key, path = rng.choice(places)
    action = rng.choice(("replace", "replace", "tweak", "tweak", "delete", "swap", "add", "nest"))
    old = holder[key]
    if action == "delete":
        del holder[key]
    elif action == "add":
        new = _new(rng)
        if isinstance(holder, dict):
            holder[rng.choice([str(key) + "_", *(str(t) for t in _TEXTS)])] = new
        else:
            holder.insert(key, copy.deepcopy(rng.choice([old, new])))
    elif action == "swap":
        other, other_key, _ = rng.choice(places)
        holder[key] = copy.deepcopy(other[other_key])
    elif action == "nest":
        holder[key] = rng.choice(([old], {"a": old}, {str(key): old}, [old, old]))
    elif action == "tweak":
        holder[key] = _tweaked(old, rng)
    else:
        holder[key] = _new(rng)
    new = holder[key] if (key in holder if isinstance(holder, dict) else key < len(holder)) else "—"
    return value, f"{action} {path}: {_short(old)} → {_short(new)}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 60 else f"{shown[:40]}… ({len(shown)} characters)"


def _places(value: Any, path: str = "", *, most: int = 3000) -> list[tuple[Any, Any, str]]:
    """Every member of every container, the long ones of a document thinned out."""
    found: list[tuple[Any, Any, str]] = []
    stack = [(value, path)] if isinstance(value, dict | list) else []
    while stack and len(found) < most:
        holder, path = stack.pop()
        members = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
        if len(members) > 40:
            members = members[:12] + members[-12:]
        for key, child in members:
            place = f"{path}.{key}" if isinstance(holder, dict) else f"{path}[{key}]"
            found.append((holder, key, place))
            if isinstance(child, dict | list):
                stack.append((child, place))
    return found


def _new(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(rng.choice((_NUMBERS, _TEXTS, _OTHERS))))


def _tweaked(old: Any, rng: random.Random) -> Any:
    if isinstance(old, bool):
        return not old
    if isinstance(old, int | float):
        return rng.choice((old + 1, old - 1, old * 2, -old, old // 2, float(old), str(old)))
    if isinstance(old, str):
        cut = rng.randrange(len(old) + 1)
        return rng.choice((old[:cut], old + "x", old.upper(), old[::-1], f"../{old}", old * 2))
    if isinstance(old, list):
        return rng.choice((old[:-1], old + old, old[::-1], old[0] if old else None))
    if isinstance(old, dict):
        return rng.choice((list(old), list(old.values()), dict(list(old.items())[1:])))
    return rng.choice((0, "", [], {}))


def mutate_json_text(text: bytes, rng: random.Random) -> tuple[bytes, str]:
    """JSON written in a way that no serializer would choose."""
    depth = rng.choice((70, 900, 20_000))
    at = rng.randrange(len(text) + 1)
    digits = b"9" * rng.choice((500, 5000))
    ways = {
        "deep": text[:1] + b'"deep":' + b'{"a":' * depth + b"1" + b"}" * depth + b"," + text[1:],
        "deep list": b"[" * depth + text + b"]" * depth,
        "doubled key": text[:1] + _member(text, rng) + text[1:],
        "mark": b"\xef\xbb\xbf" + text,
        "tail": text + rng.choice((b"\0", b"{}", b",", b"\n" * 9, b"]")),
        "utf-16": text.decode("utf-8", "replace").encode("utf-16"),
        "control": text[:at] + bytes([rng.randrange(32)]) + text[at:],
        "digits": text[:1] + b'"digits":' + digits + b"," + text[1:],
    }
    way = rng.choice(sorted(ways))
    return ways[way], way


def _member(text: bytes, rng: random.Random) -> bytes:
    """A member of a JSON object under a key that it has already."""
    try:
        key = rng.choice(sorted(json.loads(text)))
    except (ValueError, IndexError, TypeError):
        key = "x"
    return json.dumps(key).encode() + b":" + json.dumps(rng.choice(_OTHERS)).encode() + b","


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Bytes with a few of them flipped, cut, doubled or replaced."""
    data = data or b"\0"
    at, to = rng.randrange(len(data)), rng.randrange(len(data))
    size = min(rng.choice((1, 2, 4, 8, 64, 4096)), len(data) - at)
    before, piece, after = data[:at], data[at : at + size], data[at + size :]
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    ways = {
        "flipped": bytes(flipped),
        "flipped too": bytes(flipped),
        "cut": before,
        "dropped": before + after,
        "doubled": before + piece + piece + after,
        "copied": before + data[to : to + size] + after,
        "zeros": before + bytes(size) + after,
        "ones": before + b"\xff" * size + after,
        "random": before + rng.randbytes(size) + after,
    }
    way = rng.choice(sorted(ways))
    return ways[way], f"{size} bytes at {at} {way}"


def mutate_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file with another header, other numbers, or a length that lies."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.choice(("header", "header", "text", "length", "values", "rename", "bytes"))
    if kind == "bytes":
        return mutate_bytes(data, rng)
    if kind == "length":
        length = rng.choice((0, 1, size - 1, size + 1, 1 << 20, 1 << 40, (1 << 64) - 1))
        return struct.pack("<Q", length) + data[8:], f"a header of {length} bytes"
    if kind == "values":
        mutated = bytearray(body)
        value = rng.choice((float("nan"), float("inf"), -1e38, 1e-45, 0.0))
        for _ in range(rng.choice((1, 5, 200))):
            at = 4 * rng.randrange(max(1, len(body) // 4))
            mutated[at : at + 4] = struct.pack("<f", value)
        return data[: 8 + size] + bytes(mutated)[: len(body)], f"values of {value}"
    if kind == "text":
        header, what = mutate_json_text(header, rng)
    elif kind == "rename":
        entries = json.loads(header)
        old = rng.choice([key for key in entries if key != "__metadata__"] or ["x"])
        other = rng.choice([*entries, "", "a.b", f"x.{old}", old.upper(), old[: len(old) // 2]])
        renamed = {other if key == old else key: entry for key, entry in entries.items()}
        header, what = json.dumps(renamed).encode(), f"{old} renamed to {other}"
    else:
        value, what = mutate_json(json.loads(header), rng)
        header = json.dumps(value).encode()
    return struct.pack("<Q", len(header)) + header + body, f"header: {what}"


def mutate_file(file: Path, rng: random.Random) -> str:
    """Change the file at ``file`` in place, by what its name says it is; returns what was done."""
    if rng.random() < 0.06:
        return _other_kind(file, rng)
    data = file.read_bytes()
    try:
        data, what = _mutated(data, file.suffix, rng)
    except (
        ValueError,
        RecursionError,
        OverflowError,
    ):  # no JSON any more, or no number to go on with
        data, what = mutate_bytes(data, rng)
    file.unlink()
    file.write_bytes(data)
    return what


def _mutated(data: bytes, suffix: str, rng: random.Random) -> tuple[bytes, str]:
    if suffix == ".safetensors":
        return mutate_safetensors(data, rng)
    if suffix != ".json" or rng.random() < 0.1:
        return mutate_bytes(data, rng)
    if rng.random() < 0.15:
        return mutate_json_text(data, rng)
    value = json.loads(data)
    steps = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value, step = mutate_json(value, rng)
        steps.append(step)
    return json.dumps(value).encode(), "; ".join(steps)


def _other_kind(file: Path, rng: random.Random) -> str:
    """Put something else under the name of a file."""
    content = file.read_bytes()
    file.unlink()
    kind = rng.choice(
        ("nothing", "empty", "folder", "fifo", "endless", "dangling", "loop", "sparse", "locked")
    )
    if kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "endless":
        file.symlink_to("/dev/zero")
    elif kind == "dangling":
        file.symlink_to(file.parent / "nowhere")
    elif kind == "loop":
        file.symlink_to(file)
    elif kind == "sparse":
        with file.open("wb") as sparse:
            sparse.write(content)
            sparse.truncate(20 << 30)
    elif kind == "locked":
        file.write_bytes(content)
        file.chmod(0)
    return f"{kind} instead of the file"


def copy_tree(source: Path, target: Path) -> Path:
    """A copy that can be changed file by file."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target
