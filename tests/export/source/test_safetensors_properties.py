"""What holds for every safetensors file: it is read as the format's own library reads it, or refused by name."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save

from embedge.export.errors import CheckpointError
from embedge.export.source.safetensors_file import SafetensorsFile
from tests.fuzz.mutate import mutate_json

few = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate]
)

FLOATS = ("float16", "float32", "float64")
OTHERS = ("bool", "uint8", "int8", "int16", "int32", "int64")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors") / "model.safetensors"


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, NDArray[Any]]:
    found = {}
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    for name in draw(
        st.lists(names.filter(lambda n: n != "__metadata__"), min_size=1, max_size=4, unique=True)
    ):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 7
        found[name] = np.array(numbers).astype(draw(st.sampled_from(FLOATS + OTHERS)))
    return found


def split(data: bytes) -> tuple[Any, bytes]:
    """The header and the rest of a file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def joined(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def same(found: SafetensorsFile, expected: Mapping[str, NDArray[Any]]) -> bool:
    """Whether names and shapes are the same, and the values of what holds floats."""
    if found.keys() != tuple(sorted(expected)):
        return False
    for name, values in expected.items():
        if found.shape(name) != values.shape or found.is_float(name) != (
            values.dtype.name in FLOATS
        ):
            return False
        if found.is_float(name) and not np.array_equal(found.read(name), values.astype(np.float32)):
            return False
    return True


@pytest.mark.slow
@few
@given(
    tensors(),
    st.integers(0, 9),
    st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3)),
)
def test_files_are_read_as_the_library_wrote_them(
    file: Path, arrays: dict[str, NDArray[Any]], spaces: int, metadata: dict[str, str] | None
) -> None:
    header, body = split(save(arrays, metadata))
    padded = json.dumps(dict(reversed(header.items()))).encode() + b" " * spaces
    file.write_bytes(joined(padded, body))
    assert same(SafetensorsFile(file, CheckpointError), arrays)


@pytest.mark.slow
@few
@given(tensors(), st.integers(0, 1 << 32), st.sampled_from(["json", "bits", "offsets"]))
def test_a_changed_file_is_refused_by_name_or_one_that_the_library_reads_alike(
    file: Path, arrays: dict[str, NDArray[Any]], seed: int, way: str
) -> None:
    rng = random.Random(seed)
    header, body = split(save(arrays))
    if way == "json":
        header = mutate_json(header, rng)[0]
    elif way == "offsets":  # a hole, or two tensors of the same bytes
        entry = header[rng.choice(sorted(header))]
        move = rng.choice((-8, -1, 1, 8))
        entry["data_offsets"] = [place + move for place in entry["data_offsets"]]
    data = joined(json.dumps(header).encode(), body + bytes(8) * (way == "offsets"))
    if way == "bits":
        place = rng.randrange(min(len(data), 60))
        data = data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    file.write_bytes(data)
    problem, found = opened(file)
    if found is None:
        assert problem.startswith(f"{file}: ")
        return
    try:
        expected = load(data)
    except (KeyError, TypeError):  # dtypes that NumPy lacks
        return
    assert same(found, expected)


def opened(file: Path) -> tuple[str, SafetensorsFile | None]:
    """What is wrong with a file, or the file with tensors that can be read."""
    try:
        found = SafetensorsFile(file, CheckpointError)
        for name in filter(found.is_float, found.keys()):
            found.read(name)
    except CheckpointError as error:
        return str(error), None
    return "", found
