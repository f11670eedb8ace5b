"""``embedge inspect``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from embedge.runtime.cli.main import main
from tests.helpers.command import Capture, error_line


class TestInspect:
    def test_it_shows_what_happens_to_images(self, with_images: Any, capsys: Capture) -> None:
        assert main(["inspect", str(with_images.path), "--verify"]) == 0
        out = capsys.readouterr().out
        assert "takes         text, image" in out
        assert "images        scaled to 16 to 800 pixels, 4² of them a token" in out

    def test_it_shows_what_the_bundle_holds(self, two_tasks: Any, capsys: Capture) -> None:
        two_tasks.edit(
            lambda m: m["precisions"]["int4"].update(
                fidelity={
                    "code": {
                        "texts": 500,
                        "dims": {
                            "4": {"cosine_mean": 0.5},
                            "8": {"cosine_mean": 0.98765, "cosine_min": 0.9},
                        },
                        "quality": {"code": {"8": {"value": 0.75, "reference": 0.76}}},
                    },
                    "retrieval": {"of": "another form"},
                }
            )
        )
        assert main(["inspect", str(two_tasks.path)]) == 0
        out = capsys.readouterr().out
        for fact in (
            "source        tiny (bert)",
            "license       not stated",
            "vectors       8 dimensions, cosine similarity, normalized",
            "truncation    to 2, 4, 8",
            "longest text  16 tokens",
            "retrieval  retrieval-lora  query*='query: '  passage='passage: '",
            "int4       cpu",
            "int4       code       500    0.98765  0.90000          0.7500 (0.7600)",
            "15 files",
        ):
            assert fact in out

    def test_it_shows_formats_and_the_ranges_of_8_bit_codes(
        self, two_tasks: Any, capsys: Capture
    ) -> None:
        assert main(["inspect", str(two_tasks.path)]) == 0
        free = "stored as float32, float16, binary, ubinary; int8 and uint8"
        out = " ".join(capsys.readouterr().out.split())  # a terminal's lines are short
        assert f"{free} by ranges of the call, or after `embedge ranges`" in out
        ranges = {
            "lowest": [-0.5] * 7 + [-1.0],
            "highest": [0.52] * 7 + [1.04],
            "mean_square": [0.125] * 8,
            "vectors": 1300,
        }
        two_tasks.edit(lambda m: m["tasks"]["code"].update(output_ranges=ranges))
        assert main(["inspect", str(two_tasks.path)]) == 0
        out = capsys.readouterr().out
        line = " ".join(out.split())
        assert f"{free} of retrieval by ranges of the call, or after `embedge ranges`" in line
        assert "code       whole    1,300       -1.0000  1.0400   0.0045" in out
        assert main(["inspect", str(two_tasks.path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        every = ["float32", "float16", "int8", "uint8", "binary", "ubinary"]
        assert found["output_formats"]["code"] == every
        assert found["output_formats"]["retrieval"] == ["float32", "float16", "binary", "ubinary"]
        assert out.splitlines().count(f"files         {found['files_sha256'][:16]}") == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("width", [60, 80, 200])
    def test_it_fits_the_terminal(
        self,
        make_bundle: Any,
        capsys: Capture,
        monkeypatch: pytest.MonkeyPatch,
        width: int,
    ) -> None:
        """And loses nothing: the cells hold their words, in lines below each other."""
        prompt = "Instruct: Given a question, retrieve passages that answer it\nQuery: "
        tiny = make_bundle(
            tasks=[f"task-{i}" for i in range(12)], prompts={"query": prompt, "passage": prompt}
        )
        layers = tiny.path / "fp32" / "task-0.layers.json"
        name = "model.vision_tower.encoder.layers.0.self_attention.query_projection.weight"
        layers.write_text(json.dumps({"layers": [{"name": name, "shape": [2048, 8192]}]}))
        entry = {
            "size": layers.stat().st_size,
            "sha256": hashlib.sha256(layers.read_bytes()).hexdigest(),
        }
        tiny.edit(lambda m: m["files"].update({"fp32/task-0.layers.json": entry}))
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["inspect", str(tiny.path), "--layers"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width
        below = "".join(line[: width // 3].split("  ")[0] for line in lines)
        assert "model.vision_tower.encoder" in below.replace(" ", "")
        assert "task-11" in "".join(lines)

    def test_verify_finds_a_flipped_byte(self, bundle: Any, capsys: Capture) -> None:
        assert main(["inspect", str(bundle.path), "--verify"]) == 0
        assert "verified: 5 files match their SHA-256" in capsys.readouterr().out
        file = bundle.path / "fp32/shared.bin"
        data = bytearray(file.read_bytes())
        data[-1] ^= 128
        file.write_bytes(bytes(data))
        assert main(["inspect", str(bundle.path)]) == 0
        capsys.readouterr()
        assert main(["inspect", str(bundle.path), "--verify"]) == 1
        assert "shared.bin: expected SHA-256" in error_line(capsys)

    def test_layers_come_as_recorded_or_worst_first(self, two_tasks: Any, capsys: Capture) -> None:
        def order(*arguments: str) -> list[str]:
            call = ["--layers", "--task", "code", "--precision", "int4", *arguments]
            assert main(["inspect", str(two_tasks.path), *call]) == 0
            lines = capsys.readouterr().out.splitlines()
            return [line.split()[0] for line in lines if line.startswith(("small", "worst"))]

        assert order() == ["small", "worst"]
        assert order("--worst-first") == ["worst", "small"]

    def test_every_task_and_precision_has_its_table(self, two_tasks: Any, capsys: Capture) -> None:
        assert main(["inspect", str(two_tasks.path), "--layers"]) == 0
        out = capsys.readouterr().out
        for title in ("fp32, retrieval", "fp32, code", "int4, retrieval", "int4, code"):
            assert f"\n{title}\n" in out

    def test_json_is_one_document(self, bundle: Any, capsys: Capture) -> None:
        assert main(["inspect", str(bundle.path), "--json", "--layers"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["manifest"] == bundle.manifest()
        assert document["problems"] == []
        assert document["layers"][0]["layers"][1]["name"] == "worst"

    def test_what_is_not_there_is_refused(
        self, bundle: Any, tmp_path: Path, capsys: Capture
    ) -> None:
        assert main(["inspect", str(bundle.path), "--layers", "--task", "x"]) == 2
        assert "no task 'x'; it has retrieval" in error_line(capsys)
        assert main(["inspect", str(bundle.path), "--worst-first"]) == 2
        assert "go with --layers" in error_line(capsys)
        assert main(["inspect", str(tmp_path / "x")]) == 1
        assert "expected a bundle's folder" in error_line(capsys)


def test_control_characters_of_a_bundle_reach_no_terminal(
    bundle: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bundle.path / "manifest.json"
    manifest = json.loads(file.read_text())
    evil = "\x1b]0;x\x07\x1b[2J\u202e"
    manifest["source"] |= {"name": evil, "license": evil}
    for task in manifest["tasks"].values():
        task["prompts"] = {evil: evil}
    file.write_text(json.dumps(manifest))
    assert main(["inspect", str(bundle.path)]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b]0;x\\x07" in shown
    assert all(line.isprintable() for line in shown.splitlines())
    manifest["model"]["similarity"] = evil
    file.write_text(json.dumps(manifest))
    assert main(["inspect", str(bundle.path)]) == 1
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())
