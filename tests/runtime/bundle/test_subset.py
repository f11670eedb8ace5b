from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime import (
    BundleError,
    Embedder,
    EmbedgeError,
    EmbedgeValueError,
    EmbedgeWarning,
    subset_bundle,
)
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.model_card import model_card
from embedge.runtime.cli.main import main

TEXTS = ["w1 w2 w3", "w4", "w5 w6"]


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def beside(folder: Path) -> set[str]:
    return {path.name for path in folder.parent.iterdir()}


@pytest.mark.slow
def test_it_holds_what_was_chosen_and_gives_the_same_vectors(
    two_tasks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_tasks.edit(
        lambda m: (
            m.update({"of_a_later_version": [1]}),
            m["precisions"]["int4"].update(
                fidelity={"retrieval": {"cosine": 0.9}, "code": {"cosine": 0.8}},
                options={"method": "rtn", "by_task": {"code": {"method": "gptq"}, "retrieval": {}}},
            ),
        )
    )
    before, expected = names(two_tasks.path), Embedder(two_tasks.path, precision="int4")
    out = tmp_path / "part"
    options = ["--precision", "int4", "--task", "code"]
    assert main(["subset", str(two_tasks.path), str(out), *options]) == 0
    *_, tasks, wrote = capsys.readouterr().out.splitlines()
    assert tasks == "int4: code"
    assert wrote.startswith(f"wrote {out} (0.0 MB of 0.0)")
    assert names(out) == {
        "README.md",
        "manifest.json",
        "tokenizer.json",
        *(f"int4/{name}" for name in ("code.onnx", "code.bin", "shared.bin", "code.layers.json")),
    }
    assert names(two_tasks.path) == before
    part = Embedder(out, verify="full")
    assert part.tasks == ("code",)
    np.testing.assert_array_equal(part.encode(TEXTS), expected.encode(TEXTS, task="code"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["of_a_later_version"] == [1]
    assert list(manifest["tasks"]) == ["code"]
    (precision,) = manifest["precisions"].values()
    assert precision["fidelity"] == {"code": {"cosine": 0.8}}
    assert precision["options"] == {"method": "rtn", "by_task": {"code": {"method": "gptq"}}}
    assert (out / "README.md").read_text("utf-8") == model_card(Bundle(out).manifest)
    assert main(["inspect", str(out), "--verify"]) == 0


@pytest.mark.slow
def test_without_a_choice_it_is_a_copy_without_what_was_prepared(
    with_images: Any, tmp_path: Path
) -> None:
    assert main(["prepare", str(with_images.path), "--pack-only"]) == 0
    out = subset_bundle(with_images.path, tmp_path / "copy")
    assert Bundle(out).manifest == Bundle(with_images.path).manifest
    assert not (out / "prepared").exists()
    image = np.zeros((20, 30, 3), np.uint8)
    found, expected = (
        Embedder(path, verify="full").encode(["w1", image], task="code")
        for path in (out, with_images.path)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_the_links_of_the_hubs_cache_become_files(two_tasks: Any, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--bundle" / "snapshots" / "abc"
    blobs = tmp_path / "models--me--bundle" / "blobs"
    shutil.copytree(two_tasks.path, snapshot)
    blobs.mkdir()
    for number, name in enumerate(sorted(names(snapshot))):
        file = (snapshot / name).rename(blobs / f"{number:040x}")
        (snapshot / name).symlink_to(os.path.relpath(file, (snapshot / name).parent))
    out = subset_bundle(snapshot, tmp_path / "out", precisions="fp32", tasks=["code"])
    assert not any(path.is_symlink() for path in out.rglob("*"))
    linked = subset_bundle(snapshot, tmp_path / "linked", precisions=["fp32"], link=True)
    assert not any(path.is_symlink() for path in linked.rglob("*"))
    assert (linked / "fp32/shared.bin").samefile(snapshot / "fp32/shared.bin")
    expected = two_tasks.expected("code", [2, 5, 3])
    for path in (out, linked):
        found = Embedder(path, verify="full").encode("w1", task="code", prompt="")
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"precisions": ["int8"]}, "no precision 'int8'; it has fp32, int4"),
        ({"tasks": ["law"]}, "no task 'law'; it has retrieval, code"),
        ({"precisions": []}, "precisions: expected at least one name"),
        ({"tasks": [1]}, "tasks: expected at least one name"),
        ({"precisions": ["int4"], "tasks": ["code"]}, "'int4' has none of the tasks code; it has"),
        ({"tasks": ["alone"]}, "'alone' has no graph at fp32, int4; it has one at no precision"),
    ],
    ids=str,
)
def test_what_the_bundle_does_not_have_is_refused(
    two_tasks: Any, tmp_path: Path, chosen: Any, message: str
) -> None:
    def without_code_at_int4(manifest: dict[str, Any]) -> None:
        for kind in ("graphs", "layers"):
            del manifest["precisions"]["int4"][kind]["code"]
        manifest["tasks"]["alone"] = manifest["tasks"]["code"]

    two_tasks.edit(without_code_at_int4)
    with pytest.raises(EmbedgeValueError, match=message):
        subset_bundle(two_tasks.path, tmp_path / "part", **chosen)
    part = subset_bundle(two_tasks.path, tmp_path / "part", tasks=["code"])
    assert list(Bundle(part).manifest.precisions) == ["fp32"]


def test_a_place_that_is_taken_is_left_alone(two_tasks: Any, tmp_path: Path) -> None:
    out = tmp_path / "part"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(EmbedgeValueError, match="expected no such path, found one"):
        subset_bundle(two_tasks.path, out)
    assert names(out) == {"thesis.txt"}
    with pytest.raises(EmbedgeValueError, match="lies in the bundle; name a folder outside"):
        subset_bundle(two_tasks.path, two_tasks.path / "part")
    (out / "thesis.txt").unlink()
    assert Embedder(subset_bundle(two_tasks.path, out, precisions=["fp32"])).tasks


def test_damage_that_the_size_does_not_show_is_not_copied(two_tasks: Any, tmp_path: Path) -> None:
    file = two_tasks.path / "int4" / "shared.bin"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    before = beside(tmp_path / "part")
    with pytest.raises(BundleError, match=r"shared.bin: expected SHA-256 .*, found another"):
        subset_bundle(two_tasks.path, tmp_path / "part")
    assert beside(tmp_path / "part") == before
    assert subset_bundle(two_tasks.path, tmp_path / "part", precisions=["fp32"]).is_dir()


def test_what_cannot_be_written_leaves_nothing(
    two_tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_another_disk(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    before = beside(tmp_path / "part")
    monkeypatch.setattr(os, "link", on_another_disk)
    with pytest.raises(EmbedgeError, match="cannot be written: .* leave link out"):
        subset_bundle(two_tasks.path, tmp_path / "part", link=True)
    assert beside(tmp_path / "part") == before


@pytest.mark.slow
def test_a_card_with_words_of_somebodys_own_is_told_of_or_kept_where_all_is(
    two_tasks: Any, tmp_path: Path
) -> None:
    card = two_tasks.path / "README.md"
    card.write_text(model_card(Bundle(two_tasks.path).manifest))
    subset_bundle(two_tasks.path, tmp_path / "one", tasks=["code"])
    card.write_text(card.read_text().replace("# tiny", "# Our tiny"))
    with pytest.warns(EmbedgeWarning, match=r"README.md: a new card"):
        part = subset_bundle(two_tasks.path, tmp_path / "another", tasks=["code"])
    assert (part / "README.md").read_text() == model_card(Bundle(part).manifest)
    whole = subset_bundle(two_tasks.path, tmp_path / "whole")
    assert (whole / "README.md").read_bytes() == card.read_bytes()


def test_a_part_that_was_copied_by_hand_names_the_command(two_tasks: Any, tmp_path: Path) -> None:
    part = Path(shutil.copytree(two_tasks.path, tmp_path / "part"))
    shutil.rmtree(part / "int4")
    with pytest.raises(BundleError, match=r"int4.*: missing; .*`embedge subset`"):
        Embedder(part, precision="fp32")


def test_a_mounted_folder_is_not_replaced(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "volume"
    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path) == out)
        with pytest.raises(EmbedgeValueError, match="inside it, such as .*volume/bundle"):
            subset_bundle(bundle.path, out)

    def busy(*_: Any, **__: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(out))

    with monkeypatch.context() as patch:  # a bind mount looks like any folder
        patch.setattr(os, "rename", busy)
        with pytest.raises(
            EmbedgeError, match="busy; nothing was left there: name a folder inside"
        ):
            subset_bundle(bundle.path, out)
    assert [path.name for path in tmp_path.iterdir() if path != bundle.path] == ["volume"]
