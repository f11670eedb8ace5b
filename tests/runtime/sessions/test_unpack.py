"""4-bit weights made into 8-bit ones when a graph opens."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedge.runtime.bundle.onnx_model import ExternalData
from embedge.runtime.bundle.packed_weights import read_packed
from embedge.runtime.errors import BundleError
from embedge.runtime.sessions.unpack import unpack


def packed(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Two numbers of 0…15 to a byte along the last axis, the earlier one low."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), values.dtype)], axis=-1)
    return (values[..., ::2] | values[..., 1::2] << 4).astype(np.uint8)


class Weight:
    """A random weight in 4-bit blocks, and what it stands for."""

    def __init__(self, rows: int, columns: int, block: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        blocks = -(-columns // block)
        self.shape, self.block = (rows, columns), block
        self.values = rng.integers(0, 16, (rows, blocks, block))
        self.zeros = rng.integers(0, 16, (rows, blocks))
        self.scales = rng.uniform(0.1, 2, (rows, blocks)).astype(np.float32)
        self.columns = rng.uniform(0.2, 5, columns).astype(np.float32)
        self.rows = rng.uniform(0.2, 5, rows).astype(np.float32)
        self.rotation: NDArray[Any] | None = None

    def floats(self) -> NDArray[np.float64]:
        blocks: NDArray[np.float64]
        blocks = np.float64(self.values - self.zeros[..., None]) * self.scales[..., None]
        return blocks.reshape(self.shape[0], -1)[:, : self.shape[1]]

    def tensors(self) -> dict[str, NDArray[Any]]:
        rotation: dict[str, NDArray[Any]]
        rotation = {} if self.rotation is None else {"rotation": self.rotation.astype(np.float32)}
        return rotation | {
            "packed": packed(self.values),
            "block_scales": self.scales,
            "zero_points": packed(self.zeros),
            "columns": self.columns,
            "rows": self.rows,
        }

    def write(
        self,
        folder: Path,
        left_out: tuple[str, ...] = (),
        inline: bool = False,
    ) -> Path:
        entry: dict[str, Any] = {
            "out_features": self.shape[0],
            "in_features": self.shape[1],
            "block_size": self.block,
        }
        data = b""
        for name, array in self.tensors().items():
            raw = array.tobytes()
            place: Any = {"location": "w.bin", "offset": len(data) + 8, "length": len(raw)}
            if inline:
                place = {"base64": base64.b64encode(raw).decode()}
            entry[name] = None if name in left_out else place
            data += bytes(8) + raw
        (folder / "w.bin").write_bytes(data)
        file = folder / "t.unpack.json"
        file.write_text(json.dumps({"weights": {"lin": entry}}))
        return file


def unpacked(file: Path, threads: int = 2) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    def resolve(data: ExternalData) -> Path:
        return file.parent / data.location

    result = unpack(read_packed(file), resolve, threads=threads)
    assert sorted(result) == ["lin.scales", "lin.weight"]
    return result["lin.weight"], result["lin.scales"]


SHAPES = [(5, 64, 32), (3, 40, 16), (7, 48, 16), (700, 512, 64), (1, 3, 16)]  # odd counts of blocks


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_rounded_to_255_levels(
    shape: tuple[int, int, int], inline: bool, tmp_path: Path
) -> None:
    weight = Weight(*shape)
    matrix, scales = unpacked(weight.write(tmp_path, inline=inline))
    wanted = weight.floats() * weight.columns
    assert matrix.shape == (shape[1], shape[0]) and matrix.dtype == np.int8
    assert scales.dtype == np.float32
    steps = np.abs(wanted).max(axis=1) / 127
    np.testing.assert_allclose(scales, steps * weight.rows, rtol=1e-6)
    error = np.abs(matrix.T * steps[:, None] - wanted)
    assert (error <= steps[:, None] * 0.5001).all()
    assert np.abs(matrix.astype(int)).max(axis=0).min() == 127


def test_factors_may_be_left_out(tmp_path: Path) -> None:
    weight = Weight(6, 64, 32)
    matrix, scales = unpacked(weight.write(tmp_path, left_out=("columns", "rows")))
    np.testing.assert_allclose(
        matrix.T * scales[:, None], weight.floats(), atol=scales.max() * 0.51
    )
    weight.columns[:] = 1
    _, with_rows = unpacked(weight.write(tmp_path, left_out=("columns",)))
    np.testing.assert_allclose(with_rows, scales * weight.rows, rtol=1e-6)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(("shape", "size"), [((6, 64, 32), 16), ((5, 60, 16), 15), ((3, 8, 8), 1)])
def test_blocks_of_columns_are_rotated_before_they_are_rounded(
    shape: tuple[int, int, int], size: int, inline: bool, tmp_path: Path
) -> None:
    weight = Weight(*shape)
    weight.rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(size, size)))[0]
    matrix, scales = unpacked(weight.write(tmp_path, inline=inline))
    blocks = (weight.floats() * weight.columns).reshape(shape[0], -1, size)
    wanted = (blocks @ weight.rotation).reshape(shape[:2])
    steps = np.abs(wanted).max(axis=1) / 127
    np.testing.assert_allclose(scales, steps * weight.rows, rtol=1e-5)
    assert (np.abs(matrix.T * steps[:, None] - wanted) <= steps[:, None] * 0.501).all()


def test_the_number_of_threads_changes_nothing(tmp_path: Path) -> None:
    file = Weight(900, 768, 32).write(tmp_path)
    one, two = unpacked(file, threads=1), unpacked(file, threads=3)
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])


def test_a_row_of_zeros_stays_zeros(tmp_path: Path) -> None:
    weight = Weight(4, 64, 32)
    weight.values[2] = weight.zeros[2][:, None]
    matrix, scales = unpacked(weight.write(tmp_path))
    assert not matrix[:, 2].any()
    assert np.isfinite(scales).all()


def test_a_column_of_factor_zero_vanishes(tmp_path: Path) -> None:
    weight = Weight(4, 64, 32)
    weight.columns[[3, 63]] = 0
    matrix, _ = unpacked(weight.write(tmp_path))
    assert not matrix[[3, 63]].any()
    assert matrix[4].any()


def changed(file: Path, **values: Any) -> Path:
    document = json.loads(file.read_text())
    document["weights"]["lin"] |= values
    file.write_text(json.dumps(document))
    return file


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"in_features": 4096},
            r"weights\.lin: a tensor of shape \(4, 128, 16\): expected 8192 bytes",
        ),
        (
            {"values": {}},
            r"weights\.lin: an earlier embedge wrote it; export the bundle again",
        ),
        (
            {"rotation": {"base64": base64.b64encode(bytes(4 * 9)).decode()}},
            r"weights\.lin\.rotation: 3 rows do not divide 64 columns",
        ),
        (
            {"rotation": {"base64": base64.b64encode(bytes(4 * 5)).decode()}},
            r"weights\.lin: a tensor of shape \(2, 2\): expected 16 bytes, found 20",
        ),
        ({"rotation": {"base64": ""}}, r"weights\.lin\.rotation: 0 rows do not divide"),
        ({"block_size": 0}, r"block_size: expected a whole number ≥ 2"),
        ({"rows": {"base64": "no"}}, r"weights\.lin\.rows\.base64: .*export the bundle again"),
        ({"rows": {"base64": "é"}}, r"weights\.lin\.rows\.base64: .*export the bundle again"),
        ({"block_size": 5}, r"weights\.lin\.block_size: expected an even number, found 5"),
        ({"block_size": 1 << 13}, r"block_size: expected a whole number ≤ 4096"),
        ({"in_features": 10**200}, r"in_features: expected a whole number ≤ 2147483647"),
        ({"rows": {"location": "w.bin"}}, r"rows\.offset: missing"),
        ({"packed": None}, r"weights\.lin\.packed: expected an object"),
    ],
)
def test_a_damaged_list_names_what_is_wrong(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = changed(Weight(4, 64, 32).write(tmp_path), **values)
    with pytest.raises(BundleError, match=message):
        read_packed(file)


@pytest.mark.parametrize("name", ["block_scales", "columns"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(name: str, value: float, tmp_path: Path) -> None:
    weight = Weight(4, 64, 32)
    if name == "columns":
        weight.columns[5] = value
    else:
        weight.scales[1, 1] = value
    with pytest.raises(BundleError, match="weight lin: its 4-bit blocks hold values that are not"):
        unpacked(weight.write(tmp_path))
