"""A task's graph as a folder that sentence-transformers opens gives what its model in torch gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from embedge.export import export_bundle, save_pretrained
from embedge.runtime import BundleError, Embedder, EmbedgeValueError, subset_bundle
from embedge.runtime.bundle.manifest import FileEntry
from embedge.runtime.cli.main import main
from tests.helpers.command import Capture, error_line
from tests.helpers.models import make_model, random_texts, save
from tests.helpers.optimum import model_class
from tests.helpers.sentence_files import write_model

PROMPTS = {"query": "find ", "document": "text "}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with prompts, whose texts are cut at 24 tokens."""
    folder = save(make_model("bert"), tmp_path_factory.mktemp("published") / "model")
    write_model(
        folder,
        "Transformer",
        "Pooling",
        "Normalize",
        pooling={"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
        settings={"prompts": PROMPTS, "default_prompt_name": "query"},
        transformer={"max_seq_length": 24, "do_lower_case": False},
    )
    modules = json.loads((folder / "modules.json").read_text())
    numbered = [{"idx": i, "name": str(i), **module} for i, module in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(numbered))
    return folder


@pytest.fixture(scope="module")
def whole(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(
        published,
        adapters={"one": None, "two": None},
        precisions=["fp32"],
        calibration="none",
        out=tmp_path_factory.mktemp("whole") / "bundle",
    )


@pytest.fixture(scope="module")
def folder(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(whole, tmp_path_factory.mktemp("folder") / "st", task="one")


def opened(folder: Path) -> Any:
    model_class()
    from sentence_transformers import SentenceTransformer

    options = {"provider": "CPUExecutionProvider"}
    return SentenceTransformer(str(folder), backend="onnx", device="cpu", model_kwargs=options)


@pytest.mark.slow
def test_pooling_prompts_and_truncation_are_those_of_the_model_in_torch(
    folder: Path, published: Path
) -> None:
    ours = opened(folder)
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(published), device="cpu")
    texts = random_texts(12, longest=60)
    assert max(len(ids) for ids in ours.tokenizer(texts)["input_ids"]) > 24
    for call in ("encode", "encode_query", "encode_document"):
        found, expected = getattr(ours, call)(texts), getattr(theirs, call)(texts)
        assert (found * expected).sum(1).min() > 0.999999
    assert ours.max_seq_length == theirs.max_seq_length == 24
    assert ours.prompts == theirs.prompts
    assert ours.default_prompt_name == "query"
    assert ours.similarity_fn_name == "cosine"
    dimension = ours.get_embedding_dimension
    assert dimension() == theirs.get_embedding_dimension()


@pytest.mark.slow
def test_optimum_finds_the_graph_by_itself(folder: Path, whole: Path) -> None:
    of_optimum = model_class()
    from transformers import AutoTokenizer

    texts = random_texts(5, longest=60)
    rows = AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, return_tensors="np"
    )
    model = of_optimum.from_pretrained(folder)
    found = model(**rows).last_hidden_state[:, 0]
    expected = Embedder(whole, task="one").encode(texts, prompt="", on_truncate="ignore")
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_the_dimension_that_the_source_cuts_to_is_in_the_graph(whole: Path, tmp_path: Path) -> None:
    part = subset_bundle(whole, tmp_path / "part", tasks=["one"])
    document = json.loads((part / "manifest.json").read_text())
    document["model"]["truncate_dim"] = 12
    (part / "manifest.json").write_text(json.dumps(document))
    model = opened(save_pretrained(part, tmp_path / "st"))
    texts = random_texts(5, longest=20)
    found = model.encode(texts)
    assert found.shape == (5, 12)
    np.testing.assert_allclose(found, Embedder(part).encode(texts, on_truncate="ignore"), atol=1e-5)
    assert model.get_embedding_dimension() == 12


def test_left_truncation_is_said_to_the_tokenizer(whole: Path, tmp_path: Path) -> None:
    part = subset_bundle(whole, tmp_path / "part", tasks=["one"])
    document = json.loads((part / "manifest.json").read_text())
    document["tokenizer"]["truncation_side"] = "left"
    (part / "manifest.json").write_text(json.dumps(document))
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_pretrained(part, tmp_path / "st"))
    texts = random_texts(12, longest=60)
    cut = tokenizer(texts, truncation=True)["input_ids"]
    tokens = Embedder(part).tokenize(texts, prompt="")
    assert any(text.truncated for text in tokens)
    assert cut == [text.ids.tolist() for text in tokens]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m["model"]["inputs"].append("pool_mask"), "it reads pool_mask"),
        (lambda m: m["tokenizer"].update(append_eos_token_id=3), "does not add the last token"),
        (lambda m: m["model"].update(include_prompt=False), "leaves the tokens of prompts out"),
        (lambda m: m["precisions"]["fp32"].update(row_multiple=2), "--int4-block-size 32"),
    ],
    ids=["pool mask", "last token", "prompts", "rows"],
)
def test_graphs_that_need_more_are_refused_by_name(
    whole: Path, tmp_path: Path, change: Any, reason: str
) -> None:
    part = subset_bundle(whole, tmp_path / "part")
    document = json.loads((part / "manifest.json").read_text())
    change(document)
    if "pool_mask" in document["model"]["inputs"]:
        document["model"]["include_prompt"] = False
    (part / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(EmbedgeValueError, match=f"fp32 cannot stand alone: .*{reason}"):
        save_pretrained(part, tmp_path / "st", task="one")
    assert not (tmp_path / "st").exists()


def test_the_command_and_what_it_refuses(whole: Path, tmp_path: Path, capsys: Capture) -> None:
    call = ["pretrained", str(whole), str(tmp_path / "st")]
    assert main([*call, "--task", "two"]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'st'} (")
    for more, message in (
        ([], "several tasks; choose one of one, two"),
        (["--task", "three"], "no task 'three'; choose one of one, two"),
        (["--precision", "int8"], "no precision 'int8'; choose one of fp32"),
        (["--task", "one"], "expected no such path, found one"),
    ):
        assert main([*call, *more]) == 2
        assert message in error_line(capsys)
    inside = ["pretrained", str(whole), str(whole / "st"), "--task", "one"]
    assert main(inside) == 2
    assert "lies in the bundle" in error_line(capsys)


@pytest.mark.parametrize("name", ["fp32/*.bin", "fp32/one.onnx"])
def test_damaged_files_are_told_and_nothing_is_left(whole: Path, tmp_path: Path, name: str) -> None:
    part = subset_bundle(whole, tmp_path / "part")
    file = next(part.glob(name))
    content = bytearray(file.read_bytes())
    at = -1
    if file.suffix == ".onnx":  # another name of the graph, which runs all the same
        at = content.index(onnx.load(file, load_external_data=False).graph.name.encode())
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=f"{file.name}: expected SHA-256"):
        save_pretrained(part, tmp_path / "st", task="one")
    assert not (tmp_path / "st").exists()


def test_weights_in_another_folder_are_refused(whole: Path, tmp_path: Path) -> None:
    part = subset_bundle(whole, tmp_path / "part", tasks=["one"])
    document = json.loads((part / "manifest.json").read_text())
    graph = part / "fp32" / "one.onnx"
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"deep/{entry.value}"
    onnx.save(model, graph)
    (part / "fp32" / "deep").mkdir()
    for file in part.glob("fp32/*.bin"):
        file.rename(part / "fp32" / "deep" / file.name)
        document["files"][f"fp32/deep/{file.name}"] = document["files"].pop(f"fp32/{file.name}")
    document["files"]["fp32/one.onnx"] = FileEntry.of(graph).to_dict()
    (part / "manifest.json").write_text(json.dumps(document))
    Embedder(part)
    with pytest.raises(EmbedgeValueError, match=r"its weights are in fp32/deep/\w+\.bin"):
        save_pretrained(part, tmp_path / "st")
    assert not (tmp_path / "st").exists()


def test_the_card_has_the_licences_of_the_model_and_of_this_task(
    whole: Path, tmp_path: Path
) -> None:
    part = subset_bundle(whole, tmp_path / "part")
    document = json.loads((part / "manifest.json").read_text())
    document["source"]["license"] = "apache-2.0"
    adapter = {"name": "a", "rank": 4, "alpha": 8.0, "license": "cc-by-nc-4.0", "base_model": None}
    document["tasks"]["one"]["adapter"] = adapter
    document["tasks"]["two"]["adapter"] = {**adapter, "license": "x: #y"}
    (part / "manifest.json").write_text(json.dumps(document))
    for task, licences in (("one", "- cc-by-nc-4.0\n"), ("two", '- "x: #y"\n')):
        card = (save_pretrained(part, tmp_path / task, task=task) / "README.md").read_text()
        assert f"\nlicense:\n- apache-2.0\n{licences}tags:\n" in card
