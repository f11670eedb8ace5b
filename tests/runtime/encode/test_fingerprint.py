"""A fingerprint is the same for vectors that may meet in an index, and another for those that may not."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder, EmbedgeValueError, FingerprintError, subset_bundle
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.encode.fingerprint import fingerprint_of
from embedge.runtime.kernels import numerics
from embedge.runtime.kernels.numerics import CLASSES, numerics_class
from tests.helpers.files_of import file_entries

Options = dict[str, Any]


def opened(bundle: Any, **options: Any) -> Embedder:
    return Embedder(bundle.path, **{"precision": "fp32", "task": "code", **options})


def record_contents(bundle: Any) -> None:
    """Writes into a manifest what exports write from format 1.5 on."""
    whole = Bundle(bundle.path)
    found = {
        name: {task: whole.content_sha256(name, task) for task in precision.graphs}
        for name, precision in whole.manifest.precisions.items()
    }
    bundle.edit(
        lambda m: [m["precisions"][name].update(content_sha256=by) for name, by in found.items()]
    )


def test_it_is_short_and_the_hash_of_its_parts(two_tasks: Any) -> None:
    model = opened(two_tasks)
    parts = model.fingerprint_parts()
    counted = {k: v for k, v in parts.items() if k not in ("model", "task")}
    text = json.dumps(counted, sort_keys=True, separators=(",", ":"))
    assert model.fingerprint() == "e1:" + hashlib.sha256(text.encode()).hexdigest()[:16]
    assert {k: v for k, v in parts.items() if k not in ("graph", "tokenizer")} == {
        "model": "tiny",
        "task": "code",
        "vision": None,
        "tokens": {"append_eos_token_id": None},
        "precision": "fp32",
        "numerics": "cpu-float32",
        "pooling": "mean",
        "settings": {},
        "output": "embedding",
        "dim": 8,
        "normalized": True,
        "max_length": 16,
        "prompt": "query: ",
    }
    assert json.loads(json.dumps(parts)) == parts


def test_its_form_does_not_change() -> None:
    """What an index has stored goes on to be right."""
    parts = {
        "model": "a",
        "task": "b",
        "graph": "00",
        "dim": 8,
        "prompt": "é: ",
        "normalized": True,
    }
    assert fingerprint_of(parts) == "e1:09aad269e894cee7"


SAME: dict[str, Options] = {
    "the task's default prompt by name": {"prompt_name": "query"},
    "the prompt itself": {"prompt": "query: "},
    "the full dimension": {"truncate_dim": 8},
    "normalized again": {"normalize_embeddings": True},
    "the queries' role": {"role": "query"},
}
OTHER: dict[str, tuple[Options, tuple[str, ...]]] = {
    "another task": ({"task": "retrieval"}, ("graph",)),
    "another prompt": ({"prompt_name": "passage"}, ("prompt",)),
    "no prompt": ({"prompt": ""}, ("prompt",)),
    "the documents' role": ({"role": "document"}, ("prompt",)),
    "cut": ({"truncate_dim": 4}, ("dim",)),
}


@pytest.mark.parametrize("case", SAME)
def test_calls_of_one_kind_have_one_fingerprint(case: str, two_tasks: Any) -> None:
    model = opened(two_tasks)
    assert model.fingerprint(**SAME[case]) == model.fingerprint()
    model.check_fingerprint(model.fingerprint(), **SAME[case])
    model.check_fingerprint(model.fingerprint_parts(**SAME[case]))


@pytest.mark.parametrize("case", OTHER)
@pytest.mark.parametrize("recorded", [True, False], ids=["of 1.5", "older"])
def test_calls_of_another_kind_are_refused_by_the_parts_that_differ(
    case: str, recorded: bool, two_tasks: Any
) -> None:
    if recorded:
        record_contents(two_tasks)
    options, differing = OTHER[case]
    model = opened(two_tasks)
    with pytest.raises(FingerprintError) as caught:
        model.check_fingerprint(model.fingerprint_parts(**options))
    assert caught.value.differing == differing
    with pytest.raises(FingerprintError) as caught:
        model.check_fingerprint(model.fingerprint(**options))
    told = recorded or differing != ("graph",)
    assert caught.value.differing == (differing if told else ())


def test_the_message_says_what_is_stored_and_what_is_here(two_tasks: Any) -> None:
    record_contents(two_tasks)
    model, other = opened(two_tasks), opened(two_tasks, precision="int4", task="retrieval")
    with pytest.raises(FingerprintError) as caught:
        model.check_fingerprint(other.fingerprint(truncate_dim=4))
    assert re.sub(r'"[0-9a-f]{19}…|e1:[0-9a-f]{16}', "HASH", str(caught.value)) == (
        'expected vectors of the fingerprint HASH, found HASH; task: "retrieval" stored, "code" here; '
        'graph: HASH stored, HASH here; precision: "int4" stored, "fp32" here; numerics: '
        f'"{other.fingerprint_parts()["numerics"]}" stored, "cpu-float32" here; dim: 4 stored, 8 here; open the '
        "bundle and call it as the stored vectors were made, or embed everything anew"
    )
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.differing == ("graph", "precision", "numerics", "dim")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            "e1:0123456789abcdef",
            "differs in more than this bundle can tell: another model, other weights",
        ),
        (
            "e2:0123456789abcdef",
            "a fingerprint of form e2, this embedge knows e1: install the embedge that",
        ),
        (
            "abc",
            "stored: expected a fingerprint such as e1:0123456789abcdef, or its parts, found 'abc'",
        ),
        (None, "stored: expected a fingerprint such as .*, found None"),
        (
            {"dim": 8},
            r"stored: expected what fingerprint_parts\(\) gives, found no graph, numerics, prec",
        ),
        ({"parts": 3}, r"stored: expected parts as fingerprint_parts\(\) gives them, found 3"),
    ],
)
def test_what_is_no_fingerprint_of_here_is_said(stored: Any, message: str, two_tasks: Any) -> None:
    with pytest.raises((EmbedgeValueError, FingerprintError), match=message):
        opened(two_tasks).check_fingerprint(stored)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("e1:0123456789abcdef", "the fingerprint is e1:0123456789abcdef, and its parts give e1:"),
        ("e2:0123456789abcdef", "a fingerprint of form e2, this embedge knows e1"),
        (None, "expected a fingerprint such as"),
    ],
)
def test_a_fingerprint_that_its_parts_do_not_give_is_refused(
    said: str | None, message: str, two_tasks: Any
) -> None:
    model = opened(two_tasks)
    parts = model.fingerprint_parts()
    model.check_fingerprint({"fingerprint": model.fingerprint(), "parts": parts})
    with pytest.raises(EmbedgeValueError, match=message):
        model.check_fingerprint({"fingerprint": said, "parts": parts})


@pytest.mark.parametrize(
    "options", [{"role": "passage"}, {"task": "x"}, {"truncate_dim": 3}, {"multi_vector": True}]
)
def test_options_are_those_of_a_call(options: Options, two_tasks: Any) -> None:
    with pytest.raises(EmbedgeValueError, match="role|no task|truncate_dim|multi-vector"):
        opened(two_tasks).fingerprint(**options)


def test_multi_vectors_are_another_kind(make_bundle: Any) -> None:
    model = Embedder(make_bundle(multi_vector=True).path)
    assert model.fingerprint_parts(multi_vector=True) | {"output": "embedding", "dim": 8} == (
        model.fingerprint_parts()
    )


def test_images_count_with_the_tower_and_its_settings(with_images: Any) -> None:
    parts = opened(with_images).fingerprint_parts()
    assert parts["vision"] == Bundle(with_images.path).content_sha256("fp32", "vision")
    assert parts["settings"]["image"]["patch_size"] > 0


# -- bundles --------------------------------------------------------------------------------------------


def grow(bundle: Any) -> None:
    """A task and a precision more, as an export adds them."""
    document = bundle.manifest()
    shutil.copy(bundle.path / "fp32" / "code.onnx", bundle.path / "fp32" / "more.onnx")
    document["tasks"]["more"] = document["tasks"]["code"]
    document["precisions"]["fp32"]["graphs"]["more"] = "fp32/more.onnx"
    document["files"] = file_entries(bundle.path)
    (bundle.path / "manifest.json").write_text(json.dumps(document))


UNCHANGED: dict[str, Callable[[Any], object]] = {
    "another task": grow,
    "recorded contents": record_contents,
    "measurements": lambda b: b.edit(
        lambda m: m["precisions"]["fp32"].update(fidelity={"code": {"texts": 5}})
    ),
    "the name": lambda b: b.edit(lambda m: m["source"].update(name="other")),
    "dimensions": lambda b: b.edit(lambda m: m["model"].update(matryoshka_dims=None)),
    "a prompt of others": lambda b: b.edit(
        lambda m: m["tasks"]["code"]["prompts"].update(passage="other: ")
    ),
    "the version": lambda b: b.edit(lambda m: m.update(format_version="1.5")),
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_what_no_vector_depends_on_does_not_count(case: str, two_tasks: Any) -> None:
    before = opened(two_tasks).fingerprint()
    UNCHANGED[case](two_tasks)
    assert opened(two_tasks).fingerprint() == before


def test_copies_and_parts_of_a_bundle_have_its_fingerprints(two_tasks: Any, tmp_path: Path) -> None:
    record_contents(two_tasks)
    expected = opened(two_tasks).fingerprint()
    copy = shutil.copytree(two_tasks.path, tmp_path / "copy")
    part = subset_bundle(two_tasks.path, tmp_path / "part", precisions=["fp32"], tasks=["code"])
    for folder in (copy, part):
        assert Embedder(folder, precision="fp32", task="code").fingerprint() == expected
    assert set(Bundle(part).manifest.precisions["fp32"].content_sha256) == {"code"}


def change_weights(bundle: Any) -> None:
    file = bundle.path / "fp32" / "code.bin"
    data = np.frombuffer(file.read_bytes()[4096:], np.float32).copy()
    data[3] += 1e-6
    file.write_bytes(bytes(4096) + data.tobytes())
    bundle.edit(lambda m: m.update(files=file_entries(bundle.path)))


def change_tokenizer(bundle: Any) -> None:
    file = bundle.path / "tokenizer.json"
    file.write_text(file.read_text().replace('"w59"', '"w99"'))
    bundle.edit(lambda m: m.update(files=file_entries(bundle.path)))


CHANGED: dict[str, tuple[Callable[[Any], object], set[str]]] = {
    "weights": (change_weights, {"graph"}),
    "the tokenizer": (change_tokenizer, {"tokenizer"}),
    "pooling": (lambda b: b.edit(lambda m: m["model"].update(pooling="cls")), {"pooling"}),
    "normalization": (
        lambda b: b.edit(lambda m: m["model"].update(normalize=False)),
        {"normalized"},
    ),
    "the longest text": (
        lambda b: b.edit(lambda m: m["model"].update(max_length=12)),
        {"max_length"},
    ),
    "the default dimension": (
        lambda b: b.edit(lambda m: m["model"].update(truncate_dim=4)),
        {"dim"},
    ),
    "the end of texts": (
        lambda b: b.edit(lambda m: m["tokenizer"].update(append_eos_token_id=3)),
        {"tokens"},
    ),
    "the end that is cut": (
        lambda b: b.edit(lambda m: m["tokenizer"].update(truncation_side="left")),
        {"tokens"},
    ),
    "the prompt": (
        lambda b: b.edit(lambda m: m["tasks"]["code"]["prompts"].update(query="q: ")),
        {"prompt"},
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_a_vector_depends_on_counts(case: str, two_tasks: Any) -> None:
    change, differing = CHANGED[case]
    before = opened(two_tasks).fingerprint_parts()
    change(two_tasks)
    with pytest.raises(FingerprintError) as caught:
        opened(two_tasks).check_fingerprint(before)
    assert set(caught.value.differing) == differing


def test_precisions_and_prompts_of_the_embedder_count(two_tasks: Any) -> None:
    first = opened(two_tasks)
    for other in (
        opened(two_tasks, precision="int4"),
        opened(two_tasks, prompts={"query": "other: "}),
        opened(two_tasks, default_prompt_name="passage"),
        opened(two_tasks, truncate_dim=4),
    ):
        assert other.fingerprint() != first.fingerprint()


# -- machines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "integers", "attention", "own", "bfloat16", "expected"),
    [
        ("cuda:1", True, True, True, True, "cuda"),
        ("cpu", False, False, True, True, "cpu-float32"),
        ("cpu", True, True, False, True, "cpu-onnxruntime"),
        ("cpu", True, True, True, False, "cpu-embedge"),
        ("cpu", True, False, True, True, "cpu-embedge"),
        ("cpu", True, True, True, True, "cpu-embedge-bfloat16"),
    ],
)
def test_the_class_of_arithmetic_is_the_machines(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    integers: bool,
    attention: bool,
    own: bool,
    bfloat16: bool,
    expected: str,
) -> None:
    monkeypatch.setattr(numerics, "kernel_library", lambda: "library" if own else None)
    monkeypatch.setattr(numerics, "uses_bfloat16", lambda library: bfloat16)
    assert numerics_class(device=device, integers=integers, attention=attention) == expected
    assert expected in CLASSES


def test_a_machine_of_another_class_is_told_from_the_fingerprint_alone(
    int8_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Embedder(int8_bundle[0], verify="none")
    monkeypatch.setattr(numerics, "kernel_library", lambda: None)
    without = model.fingerprint()
    monkeypatch.setattr(numerics, "kernel_library", lambda: "library")
    monkeypatch.setattr(numerics, "uses_bfloat16", lambda library: False)
    with pytest.raises(
        FingerprintError, match='numerics: "cpu-onnxruntime" stored, "cpu-embedge" here'
    ):
        model.check_fingerprint(without)


def test_every_class_is_described() -> None:
    page = (Path(__file__).parents[3] / "docs/explanation/kernels.md").read_text("utf-8")
    assert [
        f"| `{name}` | {text} |"
        for name, text in CLASSES.items()
        if f"| `{name}` | {text} |" not in page
    ] == []
