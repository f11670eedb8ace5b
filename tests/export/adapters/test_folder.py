"""Files beside an adapter that say how texts become vectors count, or are refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers.integrations import peft as integration

from embedge.export import AdapterError, CheckpointError, export_bundle
from embedge.runtime import Embedder
from tests.helpers.models import cosines, make_model, random_texts, save, save_adapter, write_json

library = pytest.importorskip("sentence_transformers")
models = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

BOUND = 0.999999
TEXTS = random_texts(12)
QUERIES = ["query", "value"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that pools by the mean, and has a prompt."""
    folder = save(make_model("bert"), tmp_path_factory.mktemp("source") / "bert")
    settings = {"prompts": {"query": "find: "}, "default_prompt_name": "query"}
    write_json(folder / "config_sentence_transformers.json", settings)
    return folder


def trained(
    source: Path,
    folder: Path,
    *,
    pooling: str = "cls",
    dense: int | None = 24,
    prompts: dict[str, str] | None = None,
    default: str | None = None,
) -> Any:
    """An adapter trained and saved by sentence-transformers around ``source``, with modules of its own."""
    torch.manual_seed(5)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        # transformers 5.24 asks for PEFT 0.22, and works with 0.21
        patch.setattr(integration, "MIN_PEFT_VERSION", "0.17.0")
        warnings.simplefilter("ignore")
        parts: list[Any] = [models.Transformer(str(source), max_seq_length=32)]
        parts.append(models.Pooling(32, pooling_mode=pooling))
        parts += [models.Dense(32, dense)] if dense else []
        model = library.SentenceTransformer(
            modules=[*parts, models.Normalize()],
            device="cpu",
            prompts=prompts,
            default_prompt_name=default,
        )
        model.add_adapter(LoraConfig(target_modules=QUERIES, r=3, lora_alpha=8))
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(str(folder))
    return model.eval()


def vectors(model: Any, **options: Any) -> Any:
    """sentence-transformers' vectors, each text alone."""
    return np.stack([model.encode(t, show_progress_bar=False, **options) for t in TEXTS])


def exported(source: Path, adapters: dict[str, Path | None], out: Path, **options: Any) -> Embedder:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_bundle(source, adapters=adapters, precisions=["fp32"], out=out, **options)
    return Embedder(out, precision="fp32", threads=1)


@pytest.mark.slow
def test_modules_and_prompts_of_an_adapters_folder_are_its_tasks(
    source: Path, tmp_path: Path
) -> None:
    prompts = {"query": "look for: ", "code": "code: "}
    model = trained(source, tmp_path / "own", prompts=prompts, default="code")

    ours = exported(source, {"task": tmp_path / "own"}, tmp_path / "bundle")

    assert vectors(model).shape[1] == 24
    cases: list[dict[str, Any]] = [{}, {"prompt_name": "query"}]
    for options in cases:
        found = ours.encode(TEXTS, on_truncate="ignore", **options)  # at the adapter's 32 tokens
        assert cosines(found, vectors(model, **options)).min() >= BOUND


@pytest.mark.slow
def test_an_adapter_with_a_name_has_them_in_the_folder_above(source: Path, tmp_path: Path) -> None:
    model = trained(source, tmp_path / "own")
    (tmp_path / "own" / "code").mkdir()
    for file in (tmp_path / "own").glob("adapter_*"):
        file.rename(tmp_path / "own" / "code" / file.name)

    ours = exported(source, {"code": tmp_path / "own"}, tmp_path / "bundle")

    assert cosines(ours.encode(TEXTS, on_truncate="ignore"), vectors(model)).min() >= BOUND


@pytest.mark.slow
def test_tasks_may_differ_in_prompts(source: Path, tmp_path: Path) -> None:
    """The rest is the model's: mean pooling, no Dense layer."""
    trained(
        source,
        tmp_path / "own",
        pooling="mean",
        dense=None,
        prompts={"code": "code: "},
        default="code",
    )
    write_json(tmp_path / "own" / "sentence_bert_config.json", {"max_seq_length": 64})
    adapter = save_adapter(source, tmp_path / "plain", target=QUERIES)

    tasks = {"own": tmp_path / "own", "plain": adapter, "bare": None}
    model = exported(source, tasks, tmp_path / "bundle")

    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    found = {
        name: (task["prompts"], task["default_prompt"]) for name, task in manifest["tasks"].items()
    }
    usual = ({"query": "find: "}, "query")
    own = (
        {"code": "code: ", "query": "", "document": ""},
        "code",
    )  # as sentence-transformers saves them
    assert found == {"own": own, "plain": usual, "bare": usual}
    prompted = [f"code: {text}" for text in TEXTS]
    named = model.encode(prompted, task="own", prompt="", on_truncate="ignore")
    assert np.allclose(model.encode(TEXTS, task="own", on_truncate="ignore"), named)


@pytest.mark.slow
def test_a_task_of_other_prompts_can_be_added_to(source: Path, tmp_path: Path) -> None:
    trained(source, tmp_path / "own", pooling="mean", dense=None, prompts={"code": "code: "})
    write_json(tmp_path / "own" / "sentence_bert_config.json", {"max_seq_length": 64})
    exported(source, {"own": tmp_path / "own"}, tmp_path / "bundle")

    exported(source, {"bare": None}, tmp_path / "bundle")

    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["tasks"]["own"]["prompts"]["code"] == "code: "
    assert manifest["tasks"]["bare"]["prompts"] == {"query": "find: "}


def test_tasks_that_do_not_agree_are_refused_with_a_way_out(source: Path, tmp_path: Path) -> None:
    trained(source, tmp_path / "own")

    with pytest.raises(AdapterError) as caught:
        exported(source, {"plain": None, "own": tmp_path / "own"}, tmp_path / "bundle")

    assert (
        f"adapter 'own' ({tmp_path / 'own'}): the sentence-transformers files in its folder say how its "
        "texts become vectors, and a bundle has one of each: pooling 'mean' and 'cls', Dense layers of [] "
        "and [24] outputs, max_length 64 and 32 (tasks plain and own); export it into a bundle of its own: "
        f"--adapter own={tmp_path / 'own'} --out OTHER_BUNDLE"
    ) == str(caught.value)
    assert not (tmp_path / "bundle").exists()


def add_token(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 95, "content": "[new]"})
    file.write_text(json.dumps(content))


def no_eos(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))


def left(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncation_side": "left"}))


def slow(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("a\nb\n")


def broken(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "an added token": (add_token, r"they differ in added_tokens \('\[new\]'\); a bundle has one"),
    "another end": (no_eos, "they differ in post_processor; a bundle has one"),
    "another side": (left, "it cuts long texts on the left"),
    "another vocabulary": (
        slow,
        r"vocab\.txt is another tokenizer than the model's: it is another vo",
    ),
    "a broken one": (
        broken,
        r"tokenizer\.json is another tokenizer .* it cannot be compared with it",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_tokenizer_is_refused_by_name(kind: str, source: Path, tmp_path: Path) -> None:
    change, expected = OTHERS[kind]
    adapter = save_adapter(source, tmp_path / "adapter", target=QUERIES)
    for file in (*source.glob("tokenizer*.json"), *source.glob("special_tokens_map.json")):
        shutil.copy(file, adapter)
    change(adapter)

    with pytest.raises(AdapterError, match=expected):
        exported(source, {"task": adapter}, tmp_path / "bundle")


@pytest.mark.slow
def test_the_models_own_tokenizer_may_lie_there_however_it_is_written(
    source: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(source, tmp_path / "adapter", target=QUERIES)
    content = json.loads((source / "tokenizer.json").read_text())
    content |= {"truncation": None, "padding": None}
    (adapter / "tokenizer.json").write_text(json.dumps(content, indent=4))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"pad_token": "</s>", "padding_side": "left", "chat_template": "{{ messages }}"}
    write_json(adapter / "tokenizer_config.json", settings)

    exported(source, {"task": adapter}, tmp_path / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"is_causal": True},
            r"config\.json says another model .*: is_causal True \(the model has None\)",
        ),
        (
            {"num_attention_heads": 2},
            r"num_attention_heads 2 \(the model has 4\); PEFT does not read",
        ),
        ({"id2label": {"0": "x"}, "use_cache": False, "architectures": ["Other"]}, None),
    ],
    ids=["another mask", "other heads", "a classifier's labels"],
)
def test_a_config_of_another_model_is_refused(
    change: dict[str, Any], expected: str | None, source: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(source, tmp_path / "adapter", target=QUERIES)
    write_json(adapter / "config.json", json.loads((source / "config.json").read_text()) | change)

    if expected is None:
        exported(source, {"task": adapter}, tmp_path / "bundle")
        return
    with pytest.raises(AdapterError, match=expected):
        exported(source, {"task": adapter}, tmp_path / "bundle")


def test_settings_without_modules_are_refused(source: Path, tmp_path: Path) -> None:
    adapter = save_adapter(source, tmp_path / "adapter", target=QUERIES)
    write_json(adapter / "config_sentence_transformers.json", {"prompts": {"query": "q: "}})

    with pytest.raises(
        AdapterError, match=r"config_sentence_transformers\.json, which say how texts"
    ):
        exported(source, {"task": adapter}, tmp_path / "bundle")


@pytest.mark.slow
def test_an_adapter_beside_the_models_weights_is_refused_unless_it_is_asked_for(
    source: Path, tmp_path: Path
) -> None:
    both = shutil.copytree(source, tmp_path / "bert")
    alone = save_adapter(source, tmp_path / "alone", target=QUERIES)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(alone / file, both / file)

    write_json(both / "1_Pooling/config.json", {"pooling_mode": "mean", "embedding_dimension": 32})
    with pytest.raises(CheckpointError, match=r"holds a PEFT adapter.*--adapter NAME="):
        exported(both, {"task": None}, tmp_path / "refused")

    expected = exported(source, {"task": alone}, tmp_path / "expected").encode(TEXTS[:6])
    found = exported(both, {"task": both}, tmp_path / "found").encode(TEXTS[:6])
    theirs = library.SentenceTransformer(str(both), device="cpu")
    assert np.array_equal(found, expected)
    assert cosines(found, vectors(theirs)[:6]).min() >= BOUND
