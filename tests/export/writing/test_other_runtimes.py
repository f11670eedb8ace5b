"""A bundle's card and its graphs say how to run them without embedge, and what they say is right."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import yaml

from embedge.export import export_bundle
from embedge.runtime import Embedder
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.bundle.model_card import model_card
from embedge.runtime.host.saturation import probe_model, saturates_u8s8
from tests.helpers.jina_v4 import write_checkpoint
from tests.helpers.models import make_model, save, save_adapter, write_json

PROMPTS = {"query": 'a "query"\nfor: ', "document": "some | text `here`: "}
TEXTS = ["a b c", "ab" * 60, "", "é and more " * 3, "one two"]
# What a user would write below the initializer, and the same calls of embedge with ONNX Runtime's kernels alone.
COMPARED = """
import json, sys
from embedge.runtime import Embedder
from embedge.runtime.host.saturation import saturates_u8s8
wanted = json.loads(sys.argv[1])
ours = Embedder(folder, precision=precision)
for texts in [wanted["texts"], *([text] for text in wanted["texts"])]:
    for dim in wanted["dims"]:
        for prompt in wanted["prompts"]:
            expected = ours.encode(texts, task=task, prompt=prompt, truncate_dim=dim, on_truncate="ignore")
            options = {} if prompt is None else {"prompt": prompt}
            got = encode(texts, dim=dim, **options)
            assert got.shape == expected.shape, (got.shape, expected.shape)
            if len(texts) == 1:
                assert np.array_equal(got, expected), (texts, dim, prompt, np.abs(got - expected).max())
            else:
                assert np.abs(got - expected).max() < 1e-4, (texts, dim, prompt)
if "saturates" in globals():
    assert saturates() == saturates_u8s8()
"""


def initializer(bundle: Path, precision: str, task: str) -> str:
    """The Python of the card's section, with a user's folder, precision and task."""
    section = (bundle / "README.md").read_text("utf-8").split("## With other runtimes")[1]
    (code,) = re.findall("```python\n(.*?)```", section, re.DOTALL)
    code, folders = re.subn(
        r'Path\("path/to/this/folder"\)', lambda _: f"Path({str(bundle)!r})", code
    )
    code, names = re.subn(
        "precision, task = .*", lambda _: f"precision, task = {precision!r}, {task!r}", code
    )
    assert (folders, names) == (1, 1)
    return code


def compare(bundle: Path, precision: str, task: str, **wanted: Any) -> None:
    values = {"texts": TEXTS, "dims": [None, 16], "prompts": [None, ""], **wanted}
    done = subprocess.run(
        [sys.executable, "-c", initializer(bundle, precision, task) + COMPARED, json.dumps(values)],
        env={**os.environ, "EMBEDGE_KERNELS": "onnxruntime"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(make_model("bert"), tmp_path_factory.mktemp("source") / "tiny-bert-1")
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": PROMPTS, "default_prompt_name": "query"},
    )
    return folder


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundle")
    adapter = save_adapter(source, root / "adapter", target=["query", "value"], seed=1)
    return export_bundle(
        source,
        adapters={"plain": None, "adapted": adapter},
        precisions=["fp32", "int8", "int4", "fp16"],
        out=root / "out",
        calibration="none",
        matryoshka_dims=[16, 32],
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", ["plain", "adapted"])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_cards_python_gives_embedges_vectors_to_the_bit(
    precision: str, task: str, bundle: Path
) -> None:
    compare(bundle, precision, task, prompts=[None, "", *PROMPTS.values()])


@pytest.mark.slow
def test_the_cards_python_gives_a_shared_graph_its_tasks_tensors(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = save(make_model("bert", intermediate_size=64), tmp_path / "tiny-bert-2")
    adapters = {
        name: save_adapter(source, tmp_path / name, target=["query", "value"], seed=seed)
        for seed, name in enumerate(("first", "second"))
    }
    options: dict[str, Any] = {"adapters": adapters, "calibration": "none", "out": out}
    export_bundle(source, precisions=["int8"], layout="shared", branch_rank=16, **options)
    compare(out, "int8", "second")
    export_bundle(source, precisions=["fp32"], **options)
    compare(out, "int8", "second")
    compare(out, "fp32", "second")


@pytest.mark.slow
def test_the_cards_python_takes_texts_of_a_bundle_with_images(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "v4")
    out = export_bundle(
        tmp_path / "v4", precisions=["fp32", "int8"], calibration="none", out=tmp_path / "out"
    )
    for precision in ("fp32", "int8"):
        compare(out, precision, "retrieval", dims=[None, 16], texts=["a b c", "def f(x): x"])


@pytest.mark.slow
def test_a_decoder_without_normalization_and_with_a_default_dimension(tmp_path: Path) -> None:
    source = save(
        make_model("qwen2"), tmp_path / "tiny", pooling="lasttoken", normalize=False, max_length=40
    )
    write_json(source / "config_sentence_transformers.json", {"truncate_dim": 16})
    out = export_bundle(
        source,
        adapters={"task": None},
        precisions=["int8"],
        calibration="none",
        out=tmp_path / "out",
    )
    compare(out, "int8", "task", texts=TEXTS[:2])


@pytest.mark.slow
def test_the_probe_in_the_card_is_that_of_the_runtime(bundle: Path) -> None:
    code = initializer(bundle, "int8", "plain")
    namespace: dict[str, Any] = {}
    models: list[bytes] = []
    exec(code.split("options = ort")[0], namespace)
    sessions = namespace["ort"].InferenceSession

    def opened(model: bytes, **options: Any) -> Any:
        models.append(model)
        return sessions(model, **options)

    namespace["ort"] = SimpleNamespace(InferenceSession=opened)
    assert namespace["saturates"]() == saturates_u8s8()
    assert models == [probe_model()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js")
def test_the_cards_javascript_is_well_formed(bundle: Path, tmp_path: Path) -> None:
    card = (bundle / "README.md").read_text("utf-8")
    (code,) = re.findall("```js\n(.*?)```", card, re.DOTALL)
    (tmp_path / "initializer.mjs").write_text(code, "utf-8")
    subprocess.run(["node", "--check", str(tmp_path / "initializer.mjs")], check=True)


def test_a_bundle_for_gpus_alone_or_of_float_graphs_needs_no_option(
    source: Path, tmp_path: Path
) -> None:
    out = export_bundle(
        source,
        adapters={"task": None},
        precisions=["fp16"],
        calibration="none",
        out=tmp_path / "out",
    )
    card = (out / "README.md").read_text("utf-8")
    assert "x64quantprecision" not in card
    assert 'providers=["CUDAExecutionProvider"]' in card


# -- metadata -----------------------------------------------------------------------------------------------


def notes(bundle: Path, graph: str) -> dict[str, str]:
    model = onnx.load(str(bundle / graph), load_external_data=False)
    return {entry.key: entry.value for entry in model.metadata_props}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_a_graph_says_how_it_is_run(precision: str, bundle: Path) -> None:
    found = notes(bundle, f"{precision}/adapted.onnx")
    option = found.pop("embedge.session_config", None)
    assert option == ("session.x64quantprecision=1" if precision == "int8" else None)
    assert json.loads(found.pop("embedge.tokens")) == {
        "max_length": 64,
        "pad_token_id": Manifest.from_dict(
            json.loads((bundle / "manifest.json").read_text())
        ).tokenizer.pad_token_id,
        "truncation_side": "right",
    }
    assert json.loads(found.pop("embedge.prompts")) == {"default": "query", "texts": PROMPTS}
    states = json.loads(found.pop("embedge.states"))
    graph = onnx.load(str(bundle / precision / "adapted.onnx"), load_external_data=False).graph
    assert len(states) == 3  # before the first layer and behind each
    assert set(states) <= {name for node in graph.node for name in node.output}
    assert found == {
        "embedge.task": "adapted",
        "embedge.precision": precision,
        "embedge.onnxruntime": ">=1.30",
        "embedge.output": "pooled (mean), of length 1",
    }


def test_a_graph_that_embedge_alone_opens_says_so(bundle: Path) -> None:
    found = notes(bundle, "int4/adapted.unpacked.onnx")
    assert found["embedge.runtime"] == "embedge"
    assert found["embedge.session_config"] == "session.x64quantprecision=1"


# -- the card -----------------------------------------------------------------------------------------------


def front_matter(bundle: Path) -> Any:
    return yaml.safe_load((bundle / "README.md").read_text("utf-8").split("---\n")[1])


def test_the_front_matter_is_in_the_hubs_terms(bundle: Path) -> None:
    found = front_matter(bundle)
    assert found["library_name"] == "embedge"
    assert found["pipeline_tag"] == "feature-extraction"
    assert {"onnx", "lora", "sentence-similarity"} <= set(found["tags"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("apache-2.0", "apache-2.0"),
        ("[mit, apache-2.0]", ["mit", "apache-2.0"]),
        ("\"odd: name # 'x'\"", "odd: name"),
        ("yes: no", "yes: no"),
    ],
)
def test_a_licence_stays_what_it_is(
    declared: str, expected: Any, source: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(source, tmp_path / "tiny")
    (copy / "README.md").write_text(f"---\nlicense: {declared}\n---\n# Tiny\n")
    out = export_bundle(copy, adapters={"task": None}, precisions=["fp32"], out=tmp_path / "out")
    assert front_matter(out)["license"] == expected


def test_the_base_model_is_named_where_an_adapter_names_it(bundle: Path) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    name = document["source"]["name"]
    for said, expected in ((f"org/{name}", f"org/{name}"), ("org/other", None), ("/a/b", None)):
        document["tasks"]["adapted"]["adapter"]["base_model"] = said
        text = model_card(Manifest.from_dict(document)).split("---\n")[1]
        assert yaml.safe_load(text).get("base_model") == expected


@pytest.mark.slow
def test_a_card_is_written_anew_when_a_task_is_added_and_keeps_its_measurements(
    source: Path, bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    card = copy / "README.md"
    text = card.read_text("utf-8")
    start, end = "<!-- embedge:bench:start -->", "<!-- embedge:bench:end -->"
    measured = f"{start}\n\n| measured |\n\n{end}"
    card.write_text(re.sub(f"{start}.*{end}", measured, text, flags=re.DOTALL), "utf-8")
    options: dict[str, Any] = {"precisions": ["fp32"], "out": copy, "calibration": "none"}
    export_bundle(source, adapters={"third": None}, **options)
    assert "| third | none" in card.read_text("utf-8")
    assert measured in card.read_text("utf-8")
    edited = card.read_text("utf-8").replace("mean pooling", "my words")
    card.write_text(edited, "utf-8")
    export_bundle(source, adapters={"fourth": None}, **options)
    assert card.read_text("utf-8") == edited
    Embedder(copy, precision="fp32", verify="full").encode("a", task="fourth")
