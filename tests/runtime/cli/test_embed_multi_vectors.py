"""``embedge embed --role`` and ``--multi-vector``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder
from embedge.runtime.cli import embed as embed_module
from embedge.runtime.cli.main import main
from tests.helpers.command import Capture, SetStdin, error_line, vectors_of

TEXTS = ["w1", "w2 w3", "", "w4 w5 w6 w7"]
LINES = "".join(f"{text}\n" for text in TEXTS).encode()


def same_rows(printed: str, expected: list[Any]) -> None:
    found = [json.loads(line)["embedding"] for line in printed.splitlines()]
    assert len(found) == len(expected)
    for rows, vectors in zip(found, expected, strict=True):
        assert np.shape(rows)[:1] == vectors.shape[:1]
        np.testing.assert_allclose(np.array(rows).reshape(vectors.shape), vectors, atol=1e-6)


def test_a_line_has_a_vector_a_token(
    with_images: Any, stdin: SetStdin, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed_module, "_CHUNK_FEW", 2)
    stdin(LINES)
    call = ["embed", str(with_images.path), "--task", "code", "--multi-vector", "--batch-size", "2"]
    assert main(call) == 0
    expected = Embedder(with_images.path, task="code").encode(TEXTS, multi_vector=True)
    assert {len(rows) for rows in expected} != {1}
    same_rows(capsys.readouterr().out, list(expected))


@pytest.mark.parametrize("role", ["query", "document"])
def test_a_role_has_its_prompt(
    role: str, two_tasks: Any, tmp_path: Path, stdin: SetStdin, capsys: Capture
) -> None:
    stdin(LINES)
    call = ["embed", str(two_tasks.path), "--task", "code", "--precision", "fp32", "--role", role]
    assert main([*call, "--fingerprint", str(tmp_path / "kind.json")]) == 0
    model = Embedder(two_tasks.path, task="code", precision="fp32")
    by_role = {"query": model.encode_query, "document": model.encode_document}
    others = {"query": "document", "document": "query"}
    found = vectors_of(capsys.readouterr().out)
    np.testing.assert_allclose(found, by_role[role](TEXTS), atol=1e-6, rtol=0)
    assert np.abs(found - by_role[others[role]](TEXTS)).max() > 1e-3
    kind = json.loads((tmp_path / "kind.json").read_text("utf-8"))
    assert kind["fingerprint"] == model.fingerprint(role=role)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--multi-vector", "--format", "npy"], "--format jsonl"),
        (["--multi-vector", "--truncate-dim", "4"], "--truncate-dim is for single vectors"),
        (["--images", "--role", "query"], "--role is for texts"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(
    options: list[str], said: str, with_images: Any, stdin: SetStdin, capsys: Capture
) -> None:
    stdin(LINES)
    assert main(["embed", str(with_images.path), "--task", "code", *options]) == 2
    assert said in error_line(capsys)


def test_a_bundle_without_the_head_is_refused(
    bundle: Any, stdin: SetStdin, capsys: Capture
) -> None:
    stdin(LINES)
    assert main(["embed", str(bundle.path), "--multi-vector"]) == 2
    assert "has no multi-vector head; leave --multi-vector out" in error_line(capsys)
