"""A source is found, fetched, or refused with what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embedge.export.errors import CheckpointError, ExportError
from embedge.export.source.checkpoint import Checkpoint
from tests.helpers.weight_files import write_model


def prepare_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def prepare_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "has no weights; expected model.safetensors, or",
    ),
    "pickled weights": (
        prepare_pickle,
        r"only pickled weights.*trust them: python -c .*save_file",
    ),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "has no config.json; expected a model folder",
    ),
    "an adapter": (prepare_adapter, "holds a PEFT adapter, not a model; .* --adapter NAME="),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"config\.json: is not JSON"),
    "config of bytes": (
        lambda f: (f / "config.json").write_bytes(b"\xff"),
        r"config\.json: is not JSON",
    ),
    "config that is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "expected a JSON object, found list",
    ),
    "classes that are no list": (
        lambda f: (f / "config.json").write_text('{"architectures": 16}'),
        "architectures is 16, expected a list of class names",
    ),
    "quantized weights": (
        lambda f: (f / "config.json").write_text(
            '{"quantization_config": {"quant_method": "gptq"}}'
        ),
        "already quantized .* original float weights",
    ),
    "modules that are no list": (
        lambda f: (f / "modules.json").write_text("{}"),
        "expected a list of modules",
    ),
    "modules that leave the folder": (
        lambda f: (f / "modules.json").write_text('[{"path": "../other"}]'),
        "'../other' leaves the model folder",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_folder_that_cannot_be_used_says_why(case: str, tmp_path: Path) -> None:
    prepare, expected = UNUSABLE[case]
    prepare(write_model(tmp_path))

    with pytest.raises(CheckpointError, match=expected) as caught:
        Checkpoint(tmp_path)

    assert isinstance(caught.value, (ExportError, ValueError))
    assert str(tmp_path) in str(caught.value)


def test_a_source_that_is_neither_folder_nor_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="no such folder; name a local model folder, or a hub id"
    ):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="^not-here: no such folder"):
        Checkpoint("not-here")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a model folder, found a file"):
        Checkpoint(tmp_path / "file")


@pytest.mark.parametrize(
    ("offline", "advice"),
    [
        (
            True,
            "and the hub's cache does not hold it; nothing is fetched, because HF_HUB_OFFLINE is set: "
            "unset it, or download the model elsewhere and name its folder",
        ),
        (
            False,
            "and it could not be fetched from the hub as an id (OSError: no route); check the name and "
            "the network, or download the model elsewhere and name its folder",
        ),
    ],
)
def test_a_hub_id_that_cannot_be_fetched_is_one_line_with_one_advice(
    monkeypatch: pytest.MonkeyPatch, offline: bool, advice: str
) -> None:
    import huggingface_hub.constants

    def fail(hub_id: str, **patterns: list[str]) -> str:
        raise OSError("no route\n\nSet HF_HUB_OFFLINE=0.")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)

    with pytest.raises(CheckpointError) as caught:
        Checkpoint("some-organization/no-such-model")

    assert str(caught.value) == (f"some-organization/no-such-model: no such folder here, {advice}")


def test_a_hub_id_without_the_hubs_client_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    with pytest.raises(CheckpointError, match=r"not installed; run: pip install huggingface_hub"):
        Checkpoint("organization/name")


def test_a_hub_id_is_fetched_without_pickles_and_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    write_model(tmp_path / "3b0c")
    asked = {}

    def snapshot_download(hub_id: str, **patterns: list[str]) -> str:
        asked[hub_id] = patterns
        return str(tmp_path / "3b0c")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    assert Checkpoint("organization/some-model").name == "some-model"
    patterns = asked["organization/some-model"]
    assert not any(
        wanted.endswith((".bin", ".py", ".pt", "*")) for wanted in patterns["allow_patterns"]
    )


# -- the hub's cache ------------------------------------------------------------------------------------


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The snapshot of org/tiny-1 in a cache of the hub, which cannot be reached."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0a" * 20
    repository = tmp_path / "models--org--tiny-1"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return write_model(repository / "snapshots" / commit)


def test_a_hub_id_is_found_in_the_cache_and_recorded(cached: Path) -> None:
    by_id, by_path = Checkpoint("org/tiny-1"), Checkpoint(cached)
    assert by_id.path == by_path.path == cached
    assert (by_id.name, by_id.hub_id) == (by_path.name, by_path.hub_id) == ("tiny-1", "org/tiny-1")
    assert by_id.keys() == by_path.keys() != ()


def test_sentence_transformers_layout_is_found_there_too(cached: Path) -> None:
    (cached / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors"):
        (cached / name).rename(cached / "0_Transformer" / name)
    (cached / "modules.json").write_text(
        '[{"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]'
    )
    found = Checkpoint("org/tiny-1")
    assert found.transformer_path == cached / "0_Transformer"
    assert found.hub_id == "org/tiny-1"


def test_a_folder_elsewhere_has_no_hub_id(tmp_path: Path) -> None:
    assert Checkpoint(write_model(tmp_path / "org" / "tiny-1")).hub_id is None


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_part_of_a_model_in_the_cache_is_no_model(missing: str, cached: Path) -> None:
    (cached / missing).unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint("org/tiny-1")
    assert (
        "; the hub's cache holds no more of org/tiny-1: fetch the rest without HF_HUB_OFFLINE"
        in str(caught.value)
    )


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        (
            "",
            "the source is empty; name a local model folder, or a hub id such as organization/name",
        ),
        ("tiny-1", "; sentence-transformers' own models are sentence-transformers/tiny-1"),
        ("https://huggingface.co/org/tiny-1", "name: org/tiny-1, without what is around it"),
        (
            "https://huggingface.co/org/tiny-1/tree/main",
            "name: org/tiny-1, without what is around it",
        ),
        ("hf.co/org/tiny-1", "name: org/tiny-1, without what is around it"),
        ("org/tiny-1/", "name: org/tiny-1, without what is around it"),
        (
            "org/tiny-1@v2",
            "; a revision is fetched by `hf download org/tiny-1 --revision v2`, which prints its folder",
        ),
        ("./tiny-1", "or a hub id such as organization/name"),
        ("a/b/c", "or a hub id such as organization/name"),
    ],
)
def test_what_is_nearly_a_hub_id_is_told_what_it_may_mean(
    source: str, advice: str, cached: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(source)
    assert str(caught.value).endswith(advice)


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (
            "GatedRepoError",
            "the hub gives it to those alone who accepted its terms: accept them on its page",
        ),
        (
            "RepositoryNotFoundError",
            "the hub has no model of that id, or a private one: check the name, or log in",
        ),
    ],
)
def test_a_model_that_the_hub_does_not_give_says_what_to_do(
    kind: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fail(hub_id: str, **patterns: list[str]) -> str:
        raise type(kind, (OSError,), {})("401 Client Error")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=f"^org/tiny-1: no such folder here, and {advice}"):
        Checkpoint("org/tiny-1")
