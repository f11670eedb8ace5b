"""``embedge push`` and ``embedge pull`` with the hub's own client, against a hub on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge import Embedder, EmbedgeImportError, pull_bundle, push_bundle
from embedge.runtime.cli.main import main
from tests.helpers.command import Capture, error_line, program
from tests.helpers.fake_hub import Hub, fake_hub

pytest.importorskip("huggingface_hub")
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
    asked = len(hub.asked)
    assert call("pull", REPO, tmp_path / "out")[0] == 0
    again = [line for line in hub.asked[asked:] if line.startswith("GET /me")]
    assert not [line for line in again if "retrieval.bin" in line or "tokenizer" in line]
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
    assert "expected a private repository, found a public one; pass --public" in err
    assert not hub.files[REPO]
    assert call("push", bundle.path, REPO, "--public")[0] == 0
    hub.files[REPO]["fp32/retrieval.bin"] += b"!"
    code, _, err = call("pull", REPO, tmp_path / "out")
    assert code == 1
    assert "retrieval.bin" in err
    assert "SHA-256" in err
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
    assert "--accept-licence" in message
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
    assert json.loads((bundle.path / "manifest.json").read_text())["files"]
