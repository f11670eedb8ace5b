from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from embedge.runtime import BundleError, Embedder, EmbedgeError, ManifestError
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.cli.main import main
from embedge.runtime.sessions.session import SessionConfig, open_graph

EVERY_FILE = [
    "tokenizer.json",
    "fp32/retrieval.onnx",
    "fp32/retrieval.bin",
    "fp32/shared.bin",
    "fp32/retrieval.layers.json",
]


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_missing_file_is_named(bundle: Any, name: str) -> None:
    (bundle.path / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}: missing"):
        Embedder(bundle.path)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_truncated_file_is_named_with_both_sizes(bundle: Any, name: str) -> None:
    file = bundle.path / name
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(BundleError, match=rf"{name}: expected {size} bytes, found {size - 3}"):
        Embedder(bundle.path)


def test_a_flipped_byte_is_found_by_the_full_check_only(bundle: Any) -> None:
    file = bundle.path / "fp32/shared.bin"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(bytes(data))
    expected = bundle.manifest()["files"]["fp32/shared.bin"]["sha256"]
    Embedder(bundle.path)
    with pytest.raises(BundleError, match=rf"shared\.bin: expected SHA-256 {expected}, found "):
        Embedder(bundle.path, verify="full")


def test_weights_that_the_manifest_does_not_list_are_found_by_the_full_check(
    bundle: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle.edit(lambda document: document["files"].pop("fp32/shared.bin"))
    message = (
        "fp32/retrieval.onnx: uses weights in fp32/shared.bin, which the manifest does not list"
    )
    with pytest.raises(BundleError, match=message):
        Embedder(bundle.path, verify="full")
    assert main(["inspect", str(bundle.path), "--verify"]) == 1
    assert message in capsys.readouterr().err


def test_a_whole_bundle_passes_the_full_check(bundle: Any) -> None:
    Embedder(bundle.path, verify="full")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("{}", "format_version: missing"),
        ("\xff\xfe", "not valid JSON"),
        ('{"a":' * 65 + "1" + "}" * 65, "not valid JSON .nested deeper than 64 levels"),
        ('{"a": 1, "a": 2}', "not valid JSON .the key 'a' occurs twice"),
        ('{"a": ' + "9" * 301 + "}", "not valid JSON .a number of 301 digits"),
    ],
    ids=["cut", "empty", "deep", "list", "object", "not text", "nested", "twice", "digits"],
)
def test_a_broken_manifest_is_named(bundle: Any, text: str, message: str) -> None:
    (bundle.path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=rf"manifest\.json: {message}"):
        Embedder(bundle.path)


def test_a_newer_major_version_is_refused(bundle: Any) -> None:
    bundle.edit(lambda m: m.update(format_version="2.0"))
    with pytest.raises(ManifestError, match=r"this embedge reads version 1\.x"):
        Embedder(bundle.path)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match="found nothing there; name the folder that `embedge export`"
    ):
        Embedder(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"not an embedge bundle: it has no manifest\.json"):
        Embedder(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="expected a bundle's folder, found a file"):
        Embedder(tmp_path / "file")


def test_a_link_that_leaves_the_bundle_is_refused(bundle: Any, tmp_path: Path) -> None:
    file = bundle.path / "fp32/shared.bin"
    outside = tmp_path / "outside.bin"
    shutil.move(file, outside)
    file.symlink_to(outside)
    for verify in ("none", "size"):
        with pytest.raises(BundleError, match=r"shared\.bin: a link that leaves the bundle"):
            Embedder(bundle.path, verify=verify).encode("w1")


def test_a_link_inside_the_bundle_is_fine(bundle: Any) -> None:
    file = bundle.path / "fp32/retrieval.layers.json"
    shutil.move(file, bundle.path / "fp32/moved.json")
    file.symlink_to("moved.json")
    Embedder(bundle.path, verify="full")


def test_a_bundle_opened_through_a_link_is_fine(bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle.path)
    assert Embedder(tmp_path / "link").encode("w1").shape == (8,)


def move_weights(graph: Path, location: str) -> None:
    """Makes a graph use another file for its task's matrix."""
    model = onnx.load(graph, load_external_data=False)
    for entry in model.graph.initializer[1].external_data:
        if entry.key == "location":
            entry.value = location
    graph.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("absolute", [False, True], ids=["..", "absolute"])
def test_weights_outside_the_bundle_are_refused(
    bundle: Any, tmp_path: Path, absolute: bool
) -> None:
    outside = tmp_path / "outside.bin"
    shutil.copy(bundle.path / "fp32/retrieval.bin", outside)
    move_weights(
        bundle.path / "fp32/retrieval.onnx", str(outside) if absolute else "../../outside.bin"
    )
    with pytest.raises(
        BundleError,
        match=r"retrieval\.onnx: not a graph that embedge runs: an initializer lies at .*outside the bundle",
    ):
        Embedder(bundle.path, verify="none").encode("w1")


def test_without_checks_missing_weights_are_still_a_bundle_error(bundle: Any) -> None:
    (bundle.path / "fp32/retrieval.bin").unlink()
    with pytest.raises(BundleError, match=r"retrieval\.bin: missing"):
        Embedder(bundle.path, verify="none").encode("w1")


def test_a_graph_that_is_no_graph_is_a_bundle_error(bundle: Any) -> None:
    (bundle.path / "fp32/retrieval.onnx").write_bytes(b"\x3a\xff\xff not a model")
    with pytest.raises(
        BundleError,
        match=r"retrieval\.onnx: not a graph that embedge runs: a field at byte 4 is longer",
    ):
        Embedder(bundle.path, verify="none").encode("w1")


def test_what_onnx_runtime_refuses_is_a_bundle_error(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = bundle.path / "fp32/retrieval.onnx"
    shutil.copy(bundle.path / "fp32/retrieval.bin", tmp_path / "outside.bin")
    move_weights(graph, "../../outside.bin")
    opened = Bundle(bundle.path, verify="none")
    monkeypatch.setattr(opened, "graph_files", lambda *_: [])  # as if its own checks let it pass
    with pytest.raises(BundleError, match=r"retrieval\.onnx: ONNX Runtime .* cannot open it"):
        open_graph(opened, "fp32", "retrieval", SessionConfig(threads=1))


@pytest.mark.parametrize("text", ["{}", "not JSON"])
def test_a_broken_tokenizer_is_a_bundle_error(bundle: Any, text: str) -> None:
    (bundle.path / "tokenizer.json").write_text(text)
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer that cuts at 16"):
        Embedder(bundle.path, verify="none")


def test_a_limit_without_room_for_special_tokens_is_a_bundle_error(bundle: Any) -> None:
    bundle.edit(lambda m: m["model"].update(max_length=1))
    with pytest.raises(EmbedgeError, match="special tokens leave no room"):
        Embedder(bundle.path)


def test_the_estimate_counts_the_graph_and_the_bytes_it_uses(bundle: Any) -> None:
    graph = bundle.path / "fp32/retrieval.onnx"
    expected = graph.stat().st_size + bundle.table.nbytes + 8 * 8 * 4
    assert Bundle(bundle.path).graph_bytes("fp32", "retrieval") == expected


def test_weights_past_the_end_of_their_file_are_named_by_the_estimate(bundle: Any) -> None:
    file = bundle.path / "fp32/retrieval.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"retrieval\.bin: truncated: retrieval\.onnx uses bytes"):
        Bundle(bundle.path, verify="none").graph_bytes("fp32", "retrieval")


def test_problems_lists_every_damaged_file(bundle: Any) -> None:
    (bundle.path / "fp32/shared.bin").write_bytes(b"short")
    (bundle.path / "tokenizer.json").unlink()
    problems = Bundle(bundle.path, verify="none").problems(hashes=False)
    assert len(problems) == 2
    assert "shared.bin: expected" in problems[0]
    assert "tokenizer.json: missing" in problems[1]
