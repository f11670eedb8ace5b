from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder, EmbedgeError, EmbedgeWarning
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.cli.main import main
from embedge.runtime.host.onnxruntime import open_session
from embedge.runtime.sessions.prepared_graphs import PreparedGraphs, machine_name
from embedge.runtime.tuning.prepack_graphs import prepack_graph

TEXTS = ["w1 w2 w3", "w4", "", "w5 w6"]


def prepared_folder(path: Path, task: str = "retrieval", precision: str = "fp32") -> Path:
    return path / "prepared" / machine_name() / precision / task


@pytest.mark.slow
def test_a_prepared_graph_is_opened_in_place_of_the_bundles(bundle: Any, monkeypatch: Any) -> None:
    expected = Embedder(bundle.path).encode(TEXTS)
    prepack_graph(PreparedGraphs(Bundle(bundle.path)), "fp32", "retrieval")
    opened = []

    def open_(file: str, *options: Any) -> Any:
        opened.append(file)
        return open_session(file, *options)

    monkeypatch.setattr("embedge.runtime.sessions.session.open_session", open_)
    found = Embedder(bundle.path).encode(TEXTS)
    assert opened == [str(prepared_folder(bundle.path) / "graph.onnx")]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_the_command_prepares_every_graph_and_verifies_after(with_images: Any, capsys: Any) -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    expected = Embedder(with_images.path).encode(["w1", image], task="code")
    assert main(["prepare", str(with_images.path), "--pack-only"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "fp32/retrieval",
        "fp32/code",
        "fp32/vision",
    ]
    assert prepared_folder(with_images.path, "vision").is_dir()
    np.testing.assert_array_equal(
        Embedder(with_images.path).encode(["w1", image], task="code"), expected
    )
    assert main(["inspect", str(with_images.path), "--verify"]) == 0


def test_the_command_takes_tasks_and_precisions(two_tasks: Any, capsys: Any) -> None:
    options = ["--task", "code", "--precision", "int4", "--pack-only"]
    assert main(["prepare", str(two_tasks.path), *options]) == 0
    assert prepared_folder(two_tasks.path, "code", "int4").is_dir()
    assert not prepared_folder(two_tasks.path, "retrieval", "int4").exists()
    assert main(["prepare", str(two_tasks.path), "--task", "law"]) == 2
    assert "the bundle has no task 'law'; it has retrieval, code" in capsys.readouterr().err
    assert main(["prepare", str(two_tasks.path), "--precision", "int2"]) == 2
    assert "the bundle has no precision 'int2'" in capsys.readouterr().err


def test_remove(bundle: Any, capsys: Any) -> None:
    assert main(["prepare", str(bundle.path), "--pack-only"]) == 0
    assert main(["prepare", str(bundle.path), "--remove"]) == 0
    assert not (bundle.path / "prepared").exists()
    assert main(["prepare", str(bundle.path), "--remove"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["removed", "nothing was prepared"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "graph.bin").write_bytes(b""), "graph.bin: expected"),
        (lambda folder: (folder / "graph.bin").unlink(), "No such file"),
        (lambda folder: (folder / "prepared.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "prepared.json").write_text("{}"), "made from other files"),
    ],
)
def test_a_damaged_one_is_left_out_with_a_warning(bundle: Any, spoil: Any, reason: Any) -> None:
    expected = Embedder(bundle.path).encode(TEXTS)
    prepack_graph(PreparedGraphs(Bundle(bundle.path)), "fp32", "retrieval")
    spoil(prepared_folder(bundle.path))
    model = Embedder(bundle.path)
    with pytest.warns(EmbedgeWarning, match=f"not used: .*{reason}.*embedge prepare"):
        found = model.encode(TEXTS)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_one_of_other_weights_is_left_out_until_prepared_again(make_bundle: Any) -> None:
    first, second = make_bundle("first"), make_bundle("second", tasks=("code", "retrieval"))
    prepack_graph(PreparedGraphs(Bundle(first.path)), "fp32", "retrieval")
    shutil.copytree(first.path / "prepared", second.path / "prepared")
    model = Embedder(second.path)
    with pytest.warns(EmbedgeWarning, match="made from other files"):
        found = model.encode("w1", task="retrieval")
    np.testing.assert_allclose(found, second.expected("retrieval", [2, 5, 3]), atol=1e-6)
    prepack_graph(PreparedGraphs(Bundle(second.path)), "fp32", "retrieval")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Embedder(second.path).encode("w1", task="retrieval")


def test_another_machine_does_not_see_it(bundle: Any, monkeypatch: Any) -> None:
    prepack_graph(PreparedGraphs(Bundle(bundle.path)), "fp32", "retrieval")
    monkeypatch.setattr(
        "embedge.runtime.sessions.prepared_graphs.processor_identity", lambda: "another processor"
    )
    assert PreparedGraphs(Bundle(bundle.path)).find("fp32", "retrieval") is None


def test_a_full_disk_is_told_before_anything_is_written(bundle: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(EmbedgeError, match="the disk has 10; free some"):
        prepack_graph(PreparedGraphs(Bundle(bundle.path)), "fp32", "retrieval")
    assert not prepared_folder(bundle.path).exists()
    assert list(prepared_folder(bundle.path).parent.iterdir()) == []


def test_a_graph_that_cannot_be_prepared_leaves_the_earlier_one(bundle: Any) -> None:
    graphs = PreparedGraphs(Bundle(bundle.path))
    prepack_graph(graphs, "fp32", "retrieval")
    before = json.loads((prepared_folder(bundle.path) / "prepared.json").read_text())
    weights = bundle.path / "fp32" / "retrieval.bin"
    kept = weights.read_bytes()
    weights.write_bytes(b"")
    with pytest.raises(EmbedgeError, match="changed since the bundle was opened"):
        prepack_graph(graphs, "fp32", "retrieval")
    weights.write_bytes(kept)
    assert json.loads((prepared_folder(bundle.path) / "prepared.json").read_text()) == before
    assert graphs.find("fp32", "retrieval") is not None


@pytest.mark.slow
def test_packed_weights_are_mapped(tmp_path: Path, bundle: Any) -> None:
    """Of a wide matmul, the session's weights are file pages instead of anonymous memory."""
    from onnx import TensorProto, helper, save

    width = 3072
    weight = np.random.default_rng(0).normal(size=(width, width)).astype(np.float32)
    tensor = helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.tobytes(), raw=True)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", width]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [tensor]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin")
    from embedge.runtime.tuning.prepack_graphs import _save

    (tmp_path / "packed").mkdir()
    _save(tmp_path / "m.onnx", {}, tmp_path / "packed", panels=False, exact=False)
    plain = anonymous_mb(tmp_path / "m.onnx")
    mapped = anonymous_mb(tmp_path / "packed" / "graph.onnx")
    assert plain - mapped > 0.8 * width * width * 4 / 1e6


def anonymous_mb(file: Path) -> float:
    """Anonymous memory that a session of the graph adds, in a process of its own."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    code = """
import sys, onnxruntime, numpy as np
from embedge.runtime.host.memory import process_memory
before = process_memory()["RssAnon"]
options = onnxruntime.SessionOptions()
options.enable_cpu_mem_arena = False
session = onnxruntime.InferenceSession(sys.argv[1], options)
session.run(None, {"x": np.ones((1, 3072), np.float32)})
print((process_memory()["RssAnon"] - before) / 1e6)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("depth", range(4), ids=["prepared", "machine", "precision", "task"])
@pytest.mark.parametrize("option", ["--pack-only", "--remove", "--measure-only"])
def test_nothing_is_written_or_deleted_through_a_link(
    bundle: Any, tmp_path: Path, depth: Any, option: Any, capsys: Any
) -> None:
    others = tmp_path / "home" / "fp32" / "retrieval"
    others.mkdir(parents=True)
    (others / "thesis.txt").write_text("years of work")
    place = [bundle.path / "prepared", *prepared_folder(bundle.path).parents[1::-1]]
    place = [*place, prepared_folder(bundle.path)][depth]
    place.parent.mkdir(parents=True, exist_ok=True)
    target = [tmp_path / "home", tmp_path / "home", others.parent, others][depth]
    place.symlink_to(target)
    before = sorted(path for path in (tmp_path / "home").rglob("*"))
    status = main(["prepare", str(bundle.path), option])
    assert sorted(path for path in (tmp_path / "home").rglob("*")) == before
    assert (others / "thesis.txt").read_text() == "years of work"
    if option == "--pack-only" or (option, depth) == ("--remove", 0):
        assert status == 1
        assert f"found a link to {target}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../../../manifest.json", "/etc/passwd", "a/../b", ""])
def test_a_record_names_files_of_its_folder_alone(bundle: Any, name: Any) -> None:
    prepack_graph(PreparedGraphs(Bundle(bundle.path)), "fp32", "retrieval")
    record_file = prepared_folder(bundle.path) / "prepared.json"
    record = json.loads(record_file.read_text())
    record["files"][name] = 1
    record_file.write_text(json.dumps(record))
    with pytest.warns(EmbedgeWarning, match="not used: prepared.json: files: .*no name of a file"):
        assert Embedder(bundle.path).encode("w1").shape == (8,)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "verify"), [("graph.bin", "full"), ("graph.onnx", "full"), ("graph.onnx", "size")]
)
def test_a_flipped_bit_is_seen_and_the_bundles_graph_opened(
    bundle: Any, capsys: Any, file: Any, verify: Any
) -> None:
    expected = Embedder(bundle.path).encode(TEXTS)
    prepack_graph(PreparedGraphs(Bundle(bundle.path)), "fp32", "retrieval")
    assert main(["inspect", str(bundle.path), "--verify"]) == 0
    assert "verified: 1 prepared graphs match theirs" in capsys.readouterr().out
    flip_a_bit(prepared_folder(bundle.path) / file)
    model = Embedder(bundle.path, verify=verify)
    with pytest.warns(
        EmbedgeWarning, match=f"not used: {file}: expected SHA-256 .*embedge prepare"
    ):
        found = model.encode(TEXTS)
    np.testing.assert_array_equal(found, expected)
    assert main(["inspect", str(bundle.path), "--verify"]) == 1
    assert f"{file}: expected SHA-256" in capsys.readouterr().err
    assert main(["prepare", str(bundle.path), "--pack-only"]) == 0
    assert main(["inspect", str(bundle.path), "--verify"]) == 0


def test_a_file_is_hashed_once_until_it_changes(bundle: Any, monkeypatch: Any) -> None:
    prepack_graph(PreparedGraphs(Bundle(bundle.path)), "fp32", "retrieval")
    graphs = PreparedGraphs(Bundle(bundle.path, verify="full"))
    assert graphs.find("fp32", "retrieval") is not None
    with monkeypatch.context() as patch:
        patch.setattr(
            "embedge.runtime.sessions.prepared_graphs.sha256_of", lambda _: ("another", ())
        )
        assert graphs.find("fp32", "retrieval") is not None
    flip_a_bit(prepared_folder(bundle.path) / "graph.bin")
    with pytest.warns(EmbedgeWarning, match="expected SHA-256"):
        assert graphs.find("fp32", "retrieval") is None


def test_one_that_onnxruntime_refuses_is_left_out(bundle: Any) -> None:
    expected = Embedder(bundle.path).encode(TEXTS)
    prepack_graph(PreparedGraphs(Bundle(bundle.path)), "fp32", "retrieval")
    folder = prepared_folder(bundle.path)
    (folder / "graph.onnx").write_bytes(b"no graph")
    record = json.loads((folder / "prepared.json").read_text())
    digest = hashlib.sha256(b"no graph").hexdigest()
    record["files"]["graph.onnx"] = {"size": 8, "sha256": digest}
    (folder / "prepared.json").write_text(json.dumps(record))
    model = Embedder(bundle.path, verify="full")
    with pytest.warns(EmbedgeWarning, match="not used: .*cannot open it.*embedge prepare"):
        found = model.encode(TEXTS)
    np.testing.assert_array_equal(found, expected)


class TestInTheUsersCache:
    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: Any) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache" / "embedge"

    @pytest.fixture
    def read_only(self, bundle: Any, monkeypatch: Any) -> None:
        """The bundle's folder, as to a user who cannot write to it; also to root."""
        mkdir = Path.mkdir

        def refuse(path: Any, *arguments: Any, **options: Any) -> None:
            if path.is_relative_to(bundle.path):
                raise PermissionError(13, "Permission denied", str(path))
            mkdir(path, *arguments, **options)

        monkeypatch.setattr(Path, "mkdir", refuse)
        return bundle.path

    @pytest.mark.slow
    def test_a_bundle_that_cannot_be_written_is_prepared_there_and_found(
        self,
        cache: Any,
        read_only: Any,
        tmp_path: Path,
        monkeypatch: Any,
        capsys: Any,
    ) -> None:
        expected = Embedder(read_only).encode(TEXTS)
        assert main(["prepare", str(read_only), "--pack-only"]) == 0
        assert f"{read_only} cannot be written: into {cache}" in capsys.readouterr().out
        assert not (read_only / "prepared").exists()
        assert cache.stat().st_mode & 0o777 == 0o700
        for path in (read_only, shutil.copytree(read_only, tmp_path / "elsewhere")):
            found = PreparedGraphs(Bundle(path)).find("fp32", "retrieval")
            assert found is not None
            assert found.is_relative_to(cache)
            np.testing.assert_array_equal(Embedder(path).encode(TEXTS), expected)
        assert main(["inspect", str(read_only), "--verify"]) == 0
        assert "1 prepared graphs" in capsys.readouterr().out
        assert main(["prepare", str(read_only), "--remove"]) == 0
        assert list(cache.iterdir()) == []

    def test_what_is_written_into_the_bundle_later_takes_its_place(
        self, cache: Any, bundle: Any, monkeypatch: Any
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
            prepack_graph(PreparedGraphs(Bundle(bundle.path)), "fp32", "retrieval")
        assert len(list(cache.rglob("graph.onnx"))) == 1
        prepack_graph(PreparedGraphs(Bundle(bundle.path)), "fp32", "retrieval")
        assert list(cache.rglob("graph.onnx")) == []
        found = PreparedGraphs(Bundle(bundle.path)).find("fp32", "retrieval")
        assert found == prepared_folder(bundle.path) / "graph.onnx"

    @pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX's")
    @pytest.mark.parametrize("spoil", ["writable", "link", "file"])
    def test_one_that_others_could_have_written_is_not_used(
        self, cache: Any, read_only: Any, spoil: Any, capsys: Any
    ) -> None:
        assert main(["prepare", str(read_only), "--pack-only"]) == 0
        if spoil == "writable":
            cache.chmod(0o777)
            reason = f"other users may write to it; run `chmod go-w {cache}`"
        else:
            moved = cache.rename(cache.with_name("moved"))
            cache.symlink_to(moved) if spoil == "link" else cache.write_text("a file")
            reason = "it is no folder" if spoil == "link" else "File exists"
        assert PreparedGraphs(Bundle(read_only)).find("fp32", "retrieval") is None
        assert main(["prepare", str(read_only), "--pack-only"]) == 1
        said = capsys.readouterr().err
        assert (
            f"{read_only}: cannot be written (Permission denied), and neither can {cache}" in said
        )
        assert reason in said
        assert f"`XDG_CACHE_HOME=FOLDER embedge prepare {read_only}`" in said
