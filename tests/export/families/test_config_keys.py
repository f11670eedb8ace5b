"""Every key of a config.json is used, harmless or refused: changed one at a time against transformers."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from embedge.export import CheckpointError, export_bundle
from embedge.export.families.config_keys import _HARMLESS
from embedge.export.families.known_keys import KEYS
from embedge.runtime import Embedder, EmbedgeWarning
from tests.helpers.config_changes import FOREIGN, KINDS, VALUES, Sources, change, copied, known
from tests.helpers.models import cosines, random_texts, write_json

# A short and a long one: windows and positions show in the long one.
TEXTS = sorted(random_texts(3, longest=30), key=len)[1:]


def keys_of(kind: str) -> set[str]:
    return set(transformers.CONFIG_MAPPING[kind]().to_dict())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))


def flat(source: Path) -> dict[str, Any]:
    """A config.json with the keys of its ``text_config`` beside its own."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    return {**config.get("text_config", {}), **config}


def theirs(source: Path) -> Any:
    """transformers' vectors, or ``None`` where it refuses, warns of other weights or fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = transformers.AutoConfig.from_pretrained(source)
            model, info = transformers.AutoModel.from_pretrained(
                source,
                config=config,
                attn_implementation="eager",
                dtype=torch.float32,
                output_loading_info=True,
            )
            missing = [k for k in info["missing_keys"] if not k.startswith("pooler")]
            if missing or info.get("mismatched_keys"):
                return None
            tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
            rows = []
            for encoding in tokenizer.encode_batch(TEXTS):
                ids = torch.tensor([encoding.ids])
                with torch.no_grad():
                    states = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))[0][0]
                rows.append(states.mean(0).float().numpy())
    except Exception:  # whatever a class says to a value it does not take
        return None
    return np.stack(rows)


def assert_same_or_refused(source: Path, out: Path) -> str:
    try:
        export_bundle(
            source,
            adapters={"t": None},
            precisions=["fp32"],
            out=out,
            calibration="none",
            modality="text",
        )
    except CheckpointError:
        return "refused"
    found = Embedder(out, precision="fp32", threads=1).encode(TEXTS, on_truncate="ignore")
    expected = theirs(source)
    if expected is None:
        return "theirs fails"
    assert cosines(found, expected).min() >= 0.99999
    return "same"


def outcome(source: Path, work: Path, drop: tuple[str, ...] = (), **changes: Any) -> str:
    """What becomes of a changed config.json: an error's text where it is none of the three allowed."""
    copy = copied(source, work / "source")
    change(copy, drop, **changes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", EmbedgeWarning
            )  # what it warns of is compared all the same
            return assert_same_or_refused(copy, work / "out")
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    finally:
        for folder in (copy, work / "out"):
            shutil.rmtree(folder, ignore_errors=True)


def others(kind: str, key: str, value: Any) -> list[Any]:
    """Other values of a key."""
    values = {**VALUES, **KINDS[kind].values}
    if key in values:
        return [v for v in values[key] if v != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [value * 3 + 0.01]
    return [True, "other"] if value is None else []


@pytest.mark.parametrize("kind", [*KINDS, "qwen2_5_vl"])
def test_every_key_of_transformers_class_has_a_meaning(kind: str) -> None:
    assert keys_of(kind) - known(kind) == set()
    if kind == "qwen2_5_vl":
        vision = transformers.CONFIG_MAPPING[kind]().vision_config.to_dict()
        assert set(vision) - known("vision") - {"model_type"} == set()


def test_no_key_has_two_meanings() -> None:
    for table in KEYS.values():
        assert not table.used & table.harmless
        assert not table.used & set(table.fixed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_key_changes_the_vector_as_in_transformers_or_is_refused(
    kind: str, sources: Sources, tmp_path: Path
) -> None:
    config = flat(sources[kind])
    table = KEYS[kind]
    outcomes = {}
    for key in sorted(table.used | set(table.fixed)):
        for value in others(kind, key, config.get(key)):
            outcomes[key, str(value)] = outcome(sources[kind], tmp_path, **{key: value})
    assert {k: v for k, v in outcomes.items() if v not in ("same", "refused", "theirs fails")} == {}
    assert len([v for v in outcomes.values() if v == "same"]) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_key_has_the_default_of_transformers(
    kind: str, sources: Sources, tmp_path: Path
) -> None:
    config = flat(sources[kind])
    outcomes = {}
    for key in sorted(set(config) & KEYS[kind].used):
        outcomes[key] = outcome(sources[kind], tmp_path, drop=(key,))
    assert {k: v for k, v in outcomes.items() if v not in ("same", "refused", "theirs fails")} == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bookkeeping_of_all_sorts_locks_nobody_out(
    kind: str, sources: Sources, tmp_path: Path
) -> None:
    source = copied(sources[kind], tmp_path / "source")
    notes: dict[str, Any] = {
        "wandb_run": "a1",
        "dataset": ["x"],
        "unsloth_version": "1",
        "converted_from": "y",
    }
    defaults = transformers.CONFIG_MAPPING[kind]().to_dict()
    plain = _HARMLESS - KEYS[kind].used - {"model_type", "vocab_size", "intermediate_size"}
    change(source, **{key: value for key, value in defaults.items() if key in plain})
    harmless = {
        key: others(kind, key, defaults.get(key))
        for key in KEYS[kind].harmless - {"reference_compile"}
    }
    change(
        source,
        **{key: values[0] for key, values in harmless.items() if values},
        **notes,
        dtype="bfloat16",
        torch_dtype="float16",
        transformers_version="9.9",
        id2label={"0": "a"},
        attention_dropout=0.3,
        initializer_range=7.0,
        use_cache=False,
        tie_word_embeddings=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert assert_same_or_refused(source, tmp_path / "out") != "refused"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_key_whose_name_is_about_the_vector_is_refused_by_name(
    kind: str, sources: Sources, tmp_path: Path
) -> None:
    source = copied(sources[kind], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    for key in FOREIGN.keys() - KEYS[kind].used:
        value = FOREIGN[key]
        if value == "other way":
            value = KINDS[kind].causal is (key == "use_bidirectional_attention")
        write_json(source / "config.json", {**config, key: value})
        with pytest.raises(CheckpointError, match=f"{key} is") as caught:
            export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "out")
        assert str(source / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling.MistralEncoder"}}, "auto_map names 'modeling.Mist"),
        ({"auto_map": {"AutoModel": "org/name--modeling.LlamaModel"}}, "auto_map names"),
        ({"auto_map": {"AutoConfig": "configuration.Mine"}}, "as AutoConfig"),
        ({"architectures": ["LlamaBiModel"]}, "architectures names 'LlamaBiModel'"),
        ({"architectures": ["LlamaModel", "Other"]}, "architectures names 'Other'"),
        ({"architectures": ["Qwen2Model"]}, "architectures names 'Qwen2Model'"),
    ],
    ids=str,
)
def test_code_of_the_models_own_is_refused_by_name(
    changes: dict[str, Any], message: str, sources: Sources, tmp_path: Path
) -> None:
    source = copied(sources["llama"], tmp_path / "source")
    change(source, **changes)
    with pytest.raises(CheckpointError, match=message):
        export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": None},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
    ],
    ids=str,
)
def test_classes_of_transformers_are_known(
    changes: dict[str, Any], sources: Sources, tmp_path: Path
) -> None:
    source = copied(sources["llama"], tmp_path / "source")
    change(source, **changes)
    assert assert_same_or_refused(source, tmp_path / "out") == "same"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_a_text_config_that_the_class_does_not_read_is_refused(
    kind: str, sources: Sources, tmp_path: Path
) -> None:
    eps = {"bert": "layer_norm_eps", "qwen3": "rms_norm_eps"}[kind]
    result = outcome(sources[kind], tmp_path, drop=(eps,), text_config={eps: 0.5})
    assert result == "refused"
    assert outcome(sources[kind], tmp_path, text_config=None) == "same"
