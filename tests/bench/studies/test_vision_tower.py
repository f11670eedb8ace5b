"""The vision tower's comparison: the peer's module is transformers', and the table is about one model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from jina_v4_layout import SHORT
from random_jina_v4 import shallower, write_checkpoint

from embedge.bench.errors import BenchError
from embedge.bench.studies import vision_tower
from embedge.bench.studies.qwen_vision import FixedGridTower, load_tower
from embedge.bench.systems.qwen_vl import vision_features
from embedge.export import export_bundle

pytestmark = pytest.mark.slow

EVEN, UNEVEN = (16, 16), (12, 22)  # rows and columns of patches; windows are 8 × 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower") / "checkpoint"
    return write_checkpoint(folder, size=shallower(SHORT, 1, 2))


@pytest.mark.parametrize("grid", [EVEN, UNEVEN])
def test_windows_in_one_batch_compute_what_transformers_does(
    checkpoint: Path, grid: tuple[int, int]
) -> None:
    tower = load_tower(checkpoint)
    torch.manual_seed(0)
    pixels = torch.randn(grid[0] * grid[1], 1176)

    with torch.inference_mode():
        expected = vision_features(tower, pixels, torch.tensor([[1, *grid]]))
        found = FixedGridTower(tower, grid)(pixels)

    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # OpenVINO's own and the tracer's
def test_all_systems_agree_on_a_tiny_tower(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    export_bundle(
        checkpoint, precisions=["fp32", "int8"], out=bundle, calibration="none", progress=False
    )
    arguments = [str(bundle), str(checkpoint), "--precision", "fp32", "int8"]

    status = vision_tower.main([*arguments, "--sizes", "308x168", "--rounds", "1"])

    assert status == 0
    title, head, *rows = capsys.readouterr().out.strip().splitlines()
    assert "66 image tokens, 2 blocks, full attention in [1]" in title
    assert head.split()[0] == "system"
    cosines = {row[:29].strip(): [float(v) for v in row[29:].split()[2:]] for row in rows}
    peers = {name for name in vision_tower.SYSTEMS if name.startswith("OpenVINO")}
    if not (find_spec("openvino") and find_spec("nncf")):
        peers = set()
    torches = {name for name in vision_tower.SYSTEMS if name.startswith("torch")}
    assert set(cosines) == {"embedge fp32", "embedge int8"} | torches | peers
    assert min(cosines["embedge fp32"]) > 0.9999
    for name, (mean, low, least, centred, centred_least) in cosines.items():
        assert least <= low <= 1 and least <= mean, name
        assert mean > 0.99 and centred > 0.97 and centred_least <= centred, name


def test_centred_cosines_show_what_a_shared_channel_hides() -> None:
    generator = np.random.default_rng(0)
    reference = generator.standard_normal((50, 16)).astype(np.float32)
    other = generator.standard_normal((50, 16)).astype(np.float32)
    shared = np.eye(1, 16, dtype=np.float32) * 100

    found = vision_tower.agreement(other + shared, reference + shared)

    assert found.least > 0.99
    assert abs(found.centred_mean) < 0.2


def test_a_checkpoint_without_a_whole_tower_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())

    with pytest.raises(BenchError, match=r"expected all tensors of a vision tower, found none for"):
        load_tower(tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--sizes", "672"], "--sizes 672: expected WIDTHxHEIGHT, such as 672x896"),
        (["--without", "torch"], "--without torch: known are 'embedge', 'torch fp32'"),
    ],
)
def test_a_wrong_option_is_refused(option: list[str], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        vision_tower.main(["bundle", "checkpoint", *option])
