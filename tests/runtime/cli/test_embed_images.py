"""``embedge embed --images``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedge.runtime import Embedder
from embedge.runtime.cli import embed as embed_module
from embedge.runtime.cli.main import main
from tests.helpers.command import Capture, SetStdin, error_line, vectors_of


class TestEmbedImages:
    @pytest.fixture
    def paths(self, tmp_path: Path) -> list[Path]:
        generator = np.random.default_rng(0)
        paths = []
        for index, side in enumerate((8, 12, 16)):
            pixels = generator.integers(0, 256, (side, 8, 3)).astype(np.uint8)
            paths.append(tmp_path / f"é {index}.png")
            Image.fromarray(pixels).save(paths[-1])
        return paths

    @pytest.mark.slow
    def test_lines_are_paths(
        self, with_images: Any, paths: list[Path], stdin: SetStdin, capsys: Capture
    ) -> None:
        stdin("".join(f"{path}\n" for path in paths).encode())
        options = ["--images", "--task", "code", "--max-pixels", "100", "--truncate-dim", "4"]
        assert main(["embed", str(with_images.path), *options]) == 0
        expected = Embedder(with_images.path).encode_image(
            paths, task="code", max_pixels=100, truncate_dim=4
        )
        vectors = vectors_of(capsys.readouterr().out)
        np.testing.assert_allclose(vectors, expected, atol=1e-6, rtol=0)

    def test_objects_hold_a_path(
        self, with_images: Any, paths: list[Path], stdin: SetStdin, capsys: Capture
    ) -> None:
        lines = [{"id": index, "image": str(path)} for index, path in enumerate(paths)]
        stdin("\n".join(map(json.dumps, lines)).encode())
        options = ["--images", "--task", "code", "--input-format", "jsonl"]
        assert main(["embed", str(with_images.path), *options]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [list(row) for row in rows] == [["id", "embedding"]] * 3

    @pytest.mark.slow
    def test_npy_has_every_row_whatever_the_chunks(
        self,
        with_images: Any,
        paths: list[Path],
        tmp_path: Path,
        stdin: SetStdin,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(embed_module, "_CHUNK_FEW", 2)
        stdin("".join(f"{path}\n" for path in paths * 3).encode())
        target = tmp_path / "out.npy"
        options = ["--images", "--task", "code", "--output", str(target), "--batch-size", "2"]
        assert main(["embed", str(with_images.path), *options]) == 0
        expected = Embedder(with_images.path).encode_image(paths * 3, task="code")
        np.testing.assert_allclose(np.load(target), expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("nowhere.png", "input line 3: nowhere.png: no such file"),
            ("https://example.org/x.png", "input line 3: 'https://example.org/x.png' is a URL"),
            (__file__, "input line 3: expected an image file of a format"),
        ],
        ids=["missing", "URL", "no image"],
    )
    def test_a_bad_image_names_its_line_and_nothing_is_left(
        self,
        with_images: Any,
        paths: list[Path],
        tmp_path: Path,
        stdin: SetStdin,
        capsys: Capture,
        line: str,
        message: str,
    ) -> None:
        stdin(f"{paths[0]}\n{paths[1]}\n{line}\n".encode())
        folder = tmp_path / "out"
        folder.mkdir()
        options = ["--images", "--task", "code", "--output", str(folder / "v.npy")]
        assert main(["embed", str(with_images.path), *options]) == 1
        assert message in error_line(capsys)
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--images", "--prompt-name", "query"], "--prompt-name is for texts"),
            (["--images", "--on-truncate", "warn"], "--on-truncate is for texts"),
            (["--images", "--max-batch-tokens", "9"], "--max-batch-tokens is for texts"),
            (
                ["--images", "--max-pixels", "0"],
                "error: --max-pixels is 0; expected a whole number",
            ),
            (["--max-pixels", "99"], "--max-pixels goes with --images"),
        ],
    )
    def test_a_wrong_call_is_one_line_and_exit_code_2(
        self, with_images: Any, capsys: Capture, arguments: list[str], message: str
    ) -> None:
        assert main(["embed", str(with_images.path), "--task", "code", *arguments]) == 2
        assert message in error_line(capsys)

    def test_a_bundle_without_a_vision_tower_is_refused(self, bundle: Any, capsys: Capture) -> None:
        assert main(["embed", str(bundle.path), "--images"]) == 2
        assert "the bundle has no vision tower; it embeds: text" in error_line(capsys)
