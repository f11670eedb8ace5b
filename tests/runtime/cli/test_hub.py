"""``embedge push`` and ``embedge pull`` with the hub's own client, against a hub on this machine."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge import (
    Embedder,
    EmbedgeError,
    EmbedgeImportError,
    EmbedgeValueError,
    pull_bundle,
    push_bundle,
)
from embedge.runtime.cli.main import main
from embedge.runtime.hub_answers import asked
from tests.helpers.command import Capture, error_line, program
from tests.helpers.fake_hub import Hub, fake_hub

huggingface_hub = pytest.importorskip("huggingface_hub")
REPO = "me/small"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def call(hub: Hub, tmp_path: Path) -> Any:
    """Runs the program with a cache of its own; its exit code, output and errors."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        done = program(
            [str(argument) for argument in arguments],
            stdout=-1,
            HF_HOME=str(tmp_path / "cache"),
            **hub.environment,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return run


@pytest.mark.slow
def test_a_bundle_comes_back_as_it_went(
    two_tasks: Any, hub: Hub, call: Any, tmp_path: Path
) -> None:
    (two_tasks.path / "prepared").mkdir()
    (two_tasks.path / "prepared" / "large").write_bytes(b"of this machine")
    (two_tasks.path / "secret.txt").write_text("nobody listed it")
    code, out, err = call("push", two_tasks.path, REPO)
    assert code == 0, err
    assert "licence of tiny: not stated" in out
    assert f"files to {REPO} (private)" in out
    listed = two_tasks.manifest()["files"].keys()
    assert hub.files[REPO].keys() == {*listed, "manifest.json", "README.md"}
    assert hub.private[REPO]
    assert hub.files[REPO]["README.md"].startswith(b"---\n")
    # nothing large is sent again
    before = sum(line.startswith("PUT ") for line in hub.asked)
    assert before > 0
    assert call("push", two_tasks.path, REPO)[0] == 0
    assert sum(line.startswith("PUT ") for line in hub.asked) == before

    code, out, err = call("pull", REPO, tmp_path / "back")
    assert code == 0, err
    for name in listed:
        assert (tmp_path / "back" / name).read_bytes() == (two_tasks.path / name).read_bytes()
        assert not (tmp_path / "back" / name).is_symlink()
    there, back = (
        Embedder(path, precision="int4", task="code")
        for path in (two_tasks.path, tmp_path / "back")
    )
    np.testing.assert_array_equal(there.encode("w1"), back.encode("w1"))
    assert there.fingerprint() == back.fingerprint()


@pytest.mark.slow
def test_a_part_is_fetched_alone_and_a_dry_run_leaves_weights_there(
    two_tasks: Any, hub: Hub, call: Any, tmp_path: Path
) -> None:
    assert call("push", two_tasks.path, REPO)[0] == 0
    part = ("--precision", "fp32", "--task", "code")
    code, out, _ = call("pull", REPO, tmp_path / "out", *part, "--dry-run")
    assert code == 0
    assert "fp32/code.bin" in out
    assert "int4/" not in out
    assert not (tmp_path / "out").exists()
    assert not [line for line in hub.asked if line.startswith("GET ") and ".bin" in line]
    assert call("pull", REPO, tmp_path / "out", *part)[0] == 0
    model = Embedder(tmp_path / "out")
    assert (model.precision, model.tasks) == ("fp32", ("code",))
    fetched = [line for line in hub.asked if line.startswith("GET ") and ".bin" in line]
    assert all("/fp32/" in line for line in fetched)
    code, _, err = call("pull", REPO, tmp_path / "other", "--task", "chat")
    assert code == 2
    assert "no task 'chat'; it has retrieval, code" in err


@pytest.mark.slow
def test_a_pull_that_was_cut_off_leaves_nothing_and_goes_on(
    bundle: Any, hub: Hub, call: Any, tmp_path: Path
) -> None:
    assert call("push", bundle.path, REPO)[0] == 0
    hub.cut.add("fp32/shared.bin")
    code, _, err = call("pull", REPO, tmp_path / "out")
    assert code == 1
    assert "embedge: error: me/small: " in err
    assert not (tmp_path / "out").exists()
    hub.cut.clear()
    # Clients of version 0 keep what came of a file, in pieces of some MB, which these files lack: here 100 bytes.
    partial = list((tmp_path / "cache").rglob("*.incomplete"))
    assert len(partial) == huggingface_hub.__version__.startswith("0.")
    for file in partial:
        file.write_bytes(hub.files[REPO]["fp32/shared.bin"][:100])
    before = len(hub.asked)
    assert call("pull", REPO, tmp_path / "out")[0] == 0
    again = [line for line in hub.asked[before:] if line.startswith("GET /me")]
    assert not [line for line in again if "retrieval.bin" in line or "tokenizer" in line]
    assert hub.ranges == ({"fp32/shared.bin": 100} if partial else {})
    Embedder(tmp_path / "out", verify="full")


@pytest.mark.slow
def test_what_the_hub_refuses_is_told_with_what_to_do(
    bundle: Any, hub: Hub, call: Any, tmp_path: Path
) -> None:
    code, _, err = call("pull", "me/none", tmp_path / "out")
    assert code == 1
    assert "me/none: " in err
    assert "`hf auth login`" in err
    hub.files[REPO], hub.private[REPO] = {}, False
    code, _, err = call("push", bundle.path, REPO)
    assert code == 2
    assert "expected a private repository, found a public one; pass --public to publish" in err
    assert not hub.files[REPO]
    code, _, err = call("push", bundle.path, REPO, "--public")
    assert code == 2
    assert "licence of tiny: not stated" in err
    assert "--accept-licence" in err
    assert call("push", bundle.path, REPO, "--public", "--accept-licence")[0] == 0
    hub.refuses = '"license" must be one of these'
    code, _, err = call("push", bundle.path, REPO, "--public", "--accept-licence")
    assert code == 1
    assert '"license" must be one of these; change what it names' in err
    code, _, err = call(
        "push", bundle.path, REPO, "--public", "--accept-licence", "--revision", "v2"
    )
    assert code == 1
    assert f"""create_branch as c; c("{REPO}", branch="v2")'\n""" in err
    code, _, err = call("pull", REPO, tmp_path / "out", "--revision", "v2")
    assert code == 1
    assert "name a branch, a tag or a commit that it has with --revision" in err
    hub.token = "hf_another"
    real = program(
        ["push", str(bundle.path), "me/new"], stdout=-1, **{**hub.environment, "HF_TOKEN": "hf_old"}
    )
    assert real.returncode == 1
    assert b"hf auth login" in real.stderr


@pytest.mark.parametrize("of", ["model", "adapter"])
def test_no_licence_without_commercial_use_goes_unread(
    bundle: Any, capsys: Capture, of: str
) -> None:
    if of == "model":
        bundle.edit(lambda m: m["source"].update(license="cc-by-nc-4.0"))
    else:
        bundle.edit(lambda m: m["tasks"]["retrieval"]["adapter"].update(license="cc-by-nc-4.0"))
    call = ["push", str(bundle.path), REPO, "--dry-run"]
    assert main(call) == 2
    message = error_line(capsys)
    assert "CC BY-NC 4.0 (no commercial use)" in message
    assert "pass --accept-licence, and leave the licence in the card" in message
    assert main([*call, "--accept-license"]) == 0


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(bundle: Any, capsys: Capture) -> None:
    assert main(["push", str(bundle.path), REPO, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sizes = {name: entry["size"] for name, entry in bundle.manifest()["files"].items()}
    rows = [line.split() for line in lines if not line.startswith("licence")][:-2]
    found = {name: int(size.replace(",", "")) for size, name in rows}
    assert {name: found[name] for name in sizes} == sizes
    assert found.keys() - sizes.keys() == {"manifest.json", "README.md"}
    assert lines[-1] == f"would send {len(found)} files to {REPO} (private)"


def test_wrong_calls(
    bundle: Any, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("small", "a/b/c", "-x/y", ""):
        assert main(["push", str(bundle.path), "--dry-run", "--", name]) == 2
        assert "expected organization/name" in error_line(capsys)
    weights = bundle.path / "fp32" / "shared.bin"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["push", str(bundle.path), REPO, "--dry-run"]) == 1
    assert "shared.bin" in error_line(capsys)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EmbedgeImportError, match="needs huggingface_hub"):
        pull_bundle(REPO, tmp_path / "out")
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(EmbedgeImportError, match="needs huggingface_hub"):
        push_bundle(bundle.path, REPO)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    with pytest.raises(EmbedgeValueError, match="expected no such path, found one"):
        pull_bundle(REPO, tmp_path / "taken")


def test_nothing_goes_that_a_link_out_of_the_bundle_leads_to(
    bundle: Any, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "key").write_text("secret")
    card = bundle.path / "README.md"
    card.unlink(missing_ok=True)
    card.symlink_to(tmp_path / "key")
    assert main(["push", str(bundle.path), REPO, "--dry-run"]) == 1
    assert f"README.md: a link that leaves the bundle, to {tmp_path / 'key'}" in error_line(capsys)


@pytest.mark.parametrize(
    ("licence", "free"),
    [
        ("apache-2.0", True), ("MIT", True), ("cc-by-4.0", True), ("apache-2.0, mit", True),
        ("apple-amlr", False), ("qwen-research", False), ("other", False), (None, False),
        ("apache-2.0, gemma", False), ("cc-by-nc-4.0", False),
    ],
)  # fmt: skip
def test_only_known_licences_are_published_unread(
    bundle: Any, licence: str | None, free: bool
) -> None:
    def edit(manifest: Any) -> None:
        manifest["source"]["license"] = licence
        manifest["tasks"]["retrieval"]["adapter"]["license"] = "mit"

    bundle.edit(edit)
    call = ["push", str(bundle.path), REPO, "--dry-run", "--public"]
    assert main(call) == (0 if free else 2)
    assert main([*call, "--accept-licence"]) == 0


@pytest.mark.slow
def test_a_private_repository_is_published_when_asked(bundle: Any, hub: Hub, call: Any) -> None:
    assert call("push", bundle.path, REPO)[0] == 0
    assert hub.private[REPO]
    code, out, err = call("push", bundle.path, REPO, "--public", "--accept-licence")
    assert code == 0, err
    assert f"files to {REPO} (public)" in out
    assert hub.private[REPO] is False


@pytest.mark.slow
def test_a_card_and_a_damaged_cache_are_mended_on_the_way(
    bundle: Any, hub: Hub, call: Any, tmp_path: Path
) -> None:
    card = "---\nlicense: mit\n---\n# my own words\n"
    (bundle.path / "README.md").write_text(card)
    assert call("push", bundle.path, REPO)[0] == 0
    code, _, err = call("pull", REPO, tmp_path / "one")
    assert code == 0
    assert "a new card" not in err
    assert (tmp_path / "one" / "README.md").read_text() == card
    for name in ("fp32/retrieval.bin", "fp32/retrieval.onnx"):
        [cached] = (tmp_path / "cache").glob(f"hub/models--*/snapshots/*/{name}")
        blob = cached.resolve()
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content)
    code, _, err = call("pull", REPO, tmp_path / "two")
    assert code == 0, err
    Embedder(tmp_path / "two", verify="full")


@pytest.mark.slow
def test_what_is_damaged_on_the_hub_is_told_by_repository_and_file(
    bundle: Any, hub: Hub, call: Any, tmp_path: Path
) -> None:
    assert call("push", bundle.path, REPO)[0] == 0
    whole = hub.files[REPO]
    weights, name = whole["fp32/retrieval.bin"], "fp32/retrieval.bin"
    for change, message in (
        ({name: weights[:-1] + bytes([weights[-1] ^ 1])}, "expected SHA-256"),
        ({name: weights + b"!"}, f"expected {len(weights):,} bytes, found {len(weights) + 1:,}"),
        ({name: None}, "missing, and manifest.json lists it"),
        ({"manifest.json": None}, "no embedge bundle: it has no manifest.json"),
    ):
        files: dict[str, Any] = {**whole, **change}
        hub.files[REPO] = {n: content for n, content in files.items() if content is not None}
        code, _, err = call("pull", REPO, tmp_path / "out")
        assert code == 1
        assert f"embedge: error: {REPO}: " in err
        assert message in err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free some space, or set HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied"), "HF_HOME to a folder that you may"),
        (
            RuntimeError("403 for url: https://cdn.test/a/b?X-Amz-Signature=5ec and more"),
            "403 for url: https://cdn.test/a/b and more; check the network",
        ),
    ],
    ids=["room", "rights", "signed"],
)
def test_errors_of_the_system_have_advice_of_their_own(error: Exception, message: str) -> None:
    def ask() -> None:
        raise error

    with pytest.raises(EmbedgeError, match="me/small: ") as caught:
        asked(REPO, ask)
    assert message in str(caught.value)
    assert "Signature" not in str(caught.value)
