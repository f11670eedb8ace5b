"""Late interaction against sentence-transformers' own class, and against PyLate's rule written out in torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import sentence_transformers
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file, save_file

from embedge import Embedder
from embedge.export import CheckpointError, export_bundle
from embedge.runtime import EmbedgeValueError, EmbedgeWarning, ManifestError
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.cli.main import main
from tests.helpers.late_models import SKIPPED, PyLate, write_native, write_pylate, write_stanford
from tests.helpers.models import cosines, linears, random_texts, save_adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*the tokenizer has no token for"),
]

TEXTS = [*random_texts(16, longest=28), *random_texts(6), "a.b,c!", "Hello. World, again!"]
BOUND = 0.999999
FAR = {"local_attention": 64}  # so that all of a filled query sees some of it
NATIVE = hasattr(sentence_transformers, "MultiVectorEncoder")
needs_native = pytest.mark.skipif(not NATIVE, reason="needs sentence-transformers 6")

Rows = Sequence[NDArray[Any]]


def exported(source: Path, out: Path, adapter: Path | None = None, **options: Any) -> Embedder:
    settings: dict[str, Any] = {"precisions": ["fp32"], "calibration": "none", **options}
    export_bundle(source, adapters={"t": adapter}, out=out, **settings)
    return Embedder(out, precision="fp32", threads=1)


def encoded(model: Embedder, role: str | None, texts: Sequence[str] = TEXTS) -> Rows:
    """Multi-vectors of a role's texts."""
    by_role = {"query": model.encode_query, "document": model.encode_document}
    encode: Callable[..., Any] = model.encode if role is None else by_role[role]
    rows: Rows = encode(list(texts), multi_vector=True, on_truncate="ignore")
    return rows


def assert_same(found: Rows, expected: Rows, bound: float = BOUND) -> None:
    """Every row of every text has the direction and the length of that expected."""
    assert [rows.shape for rows in found] == [rows.shape for rows in expected]
    one, other = np.concatenate(found), np.concatenate(expected)
    assert cosines(one, other).min() >= bound
    lengths = np.linalg.norm(other, axis=1)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), lengths, rtol=1e-5)


PYLATE: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "bert, all attend": ("bert", {"ATTEND_TO_EXPANSION_TOKENS": True, "MODEL_TYPE": "ColBERT"}),
    "bert, nothing filled": ("bert", {"DO_QUERY_EXPANSION": False}),
    "bert, other lengths": ("bert", {"QUERY_LENGTH": 20, "DOCUMENT_LENGTH": 9}),
    "modernbert": ("modernbert", {"widths": (24, 16), "residual": True, **FAR}),
    "modernbert, one width": ("modernbert", {"widths": (32, 8), "residual": True, **FAR}),
}


@pytest.mark.parametrize("case", PYLATE)
def test_pylates_layout_gives_what_its_rule_says(case: str, tmp_path: Path) -> None:
    kind, options = PYLATE[case]
    source = write_pylate(tmp_path / "source", kind, **options)
    model, reference = exported(source, tmp_path / "out"), PyLate(source)
    queries, documents = encoded(model, "query"), encoded(model, "document")
    assert_same(queries, [reference.encode(text, is_query=True) for text in TEXTS])
    assert_same(documents, [reference.encode(text, is_query=False) for text in TEXTS])
    alone = [encoded(model, "query", [text])[0] for text in TEXTS]
    assert_same(queries, alone)
    if NATIVE:
        assert_as_native(source, model)


def assert_as_native(source: Path, model: Embedder) -> None:
    """The vectors of queries, documents and other texts, and the scores of the former two."""
    module: Any = sentence_transformers  # of version 6
    native = module.MultiVectorEncoder(str(source), device="cpu")
    options = {"convert_to_numpy": True, "batch_size": 7}
    queries = native.encode_query(TEXTS, **options)
    documents = native.encode_document(TEXTS, **options)
    assert_same(encoded(model, "query"), queries)
    assert_same(encoded(model, "document"), documents)
    assert_same(encoded(model, None), native.encode(TEXTS, **options))
    expected = np.asarray(native.similarity(queries, documents))
    np.testing.assert_allclose(model.similarity(queries, documents), expected, rtol=1e-4, atol=1e-4)
    pairs = np.asarray(native.similarity_pairwise(queries, documents))
    np.testing.assert_allclose(
        model.similarity_pairwise(queries, documents), pairs, rtol=1e-4, atol=1e-4
    )
    assert model.similarity_fn_name == native.similarity_fn_name


_FILLED = {"strategy": "fixed", "length": 14}
NATIVE_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed": ("bert", {"transformer": {"query_expansion": _FILLED}, "mask": {}}),
    "at least so long, both skip": (
        "bert",
        {
            "transformer": {
                "query_expansion": {"strategy": "min", "length": 14},
                "query_length": 40,
                "document_length": 33,
            },
            "mask": {"skiplist_words": list(SKIPPED), "skiplist_tasks": ["query", "document"]},
        },
    ),
    "another token, attended": (
        "llama",
        {
            "transformer": {"query_expansion": {**_FILLED, "attend": True, "token": "<pad>"}},
            "mask": {"skiplist_words": ["."]},
        },
    ),
    "no mask, no Dense, no length 1": (
        "modernbert",
        {
            "transformer": {"query_length": 20},
            "widths": (),
            "normalize": False,
            "settings": {"similarity_fn_name": "meanmaxsim", "prompts": {"query": "find: "}},
        },
    ),
    "positions from the padding token": (
        "xlm-roberta",
        {"transformer": {"query_expansion": _FILLED}, "mask": {}},
    ),
    "residual, no prompts": (
        "modernbert",
        {
            "transformer": {"query_expansion": _FILLED},
            "mask": {},
            "widths": (32, 12),
            "residual": True,
            "settings": {"prompts": {}},
            **FAR,
        },
    ),
}


@needs_native
@pytest.mark.parametrize("case", NATIVE_CASES)
def test_sentence_transformers_own_layout(case: str, tmp_path: Path) -> None:
    kind, options = NATIVE_CASES[case]
    source = write_native(tmp_path / "source", kind, **options)
    assert_as_native(source, exported(source, tmp_path / "out"))


STANFORD: dict[str, dict[str, Any] | None] = {
    "no metadata": None,
    "lengths": {"query_maxlen": 12, "doc_maxlen": 30, "attend_to_mask_tokens": True},
    "other markers, punctuation too": {
        "query_token_id": "q",
        "doc_token_id": "[unused0]",
        "mask_punctuation": False,
    },
}


@needs_native
@pytest.mark.parametrize("case", STANFORD)
@pytest.mark.filterwarnings("ignore:.*its defaults are taken")
def test_stanfords_layout(case: str, tmp_path: Path) -> None:
    source = write_stanford(tmp_path / "source", STANFORD[case])
    assert_as_native(source, exported(source, tmp_path / "out"))


def test_stanfords_layout_without_its_metadata_is_warned_of(tmp_path: Path) -> None:
    source = write_stanford(tmp_path / "source", None)
    with pytest.warns(EmbedgeWarning, match=r"artifact\.metadata: expected .* defaults are taken"):
        exported(source, tmp_path / "out")


def test_stanfords_layout_is_read_without_its_class_too(tmp_path: Path) -> None:
    source = write_stanford(tmp_path / "source", {"query_maxlen": 12})
    model = exported(source, tmp_path / "out")
    queries, documents = encoded(model, "query"), encoded(model, "document")
    assert {rows.shape for rows in queries} == {(12, 16)}
    [plain] = encoded(model, "document", ["a.b,c!"])
    assert len(plain) == len("abc") + 3  # with the marker and both ends
    assert model.prompts == {"query": "[unused0] ", "document": "[unused1] "}
    assert len(documents) == len(TEXTS)


def test_adapters_are_merged_below_the_head(tmp_path: Path) -> None:
    source = write_pylate(tmp_path / "source", "bert")
    adapter = save_adapter(source, tmp_path / "adapter", target=linears("bert"))
    model, reference = exported(source, tmp_path / "out", adapter), PyLate(source)
    without = [reference.encode(text, is_query=True) for text in TEXTS]
    reference.model = PeftModel.from_pretrained(reference.model, adapter).eval()
    found = encoded(model, "query")
    assert_same(found, [reference.encode(text, is_query=True) for text in TEXTS])
    assert cosines(np.concatenate(found), np.concatenate(without)).max() < 0.9999


@pytest.mark.parametrize("name", ["1_Dense", "2_Dense", "residual", "norm"])
def test_every_part_of_the_head_reaches_the_vectors(name: str, tmp_path: Path) -> None:
    source = write_pylate(tmp_path / "source", "modernbert", widths=(24, 16), residual=True, **FAR)
    before = np.concatenate(encoded(exported(source, tmp_path / "before"), "document"))
    file = source / ("1_Dense" if name == "residual" else name) / "model.safetensors"
    key = "residual.weight" if name == "residual" else "linear.weight"
    if name == "norm":
        file, key = source / "model.safetensors", "final_norm.weight"
    tensors = load_file(file)
    save_file({**tensors, key: torch.zeros_like(tensors[key])}, file, metadata={"format": "pt"})
    after = np.concatenate(encoded(exported(source, tmp_path / "after"), "document"))
    assert np.abs(after - before).max() > 1e-3


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_int8_keeps_the_direction_of_tokens_with_outlier_channels(
    kind: str, tmp_path: Path
) -> None:
    options = {"hidden_size": 64, "intermediate_size": 128, "gain": 0.7, **FAR}
    source = write_pylate(tmp_path / "source", kind, **(options if kind == "modernbert" else {}))
    if kind == "bert":
        options.pop("local_attention")
        source = write_pylate(tmp_path / "wide", kind, **options)
    _with_outliers(source / "model.safetensors")
    exact = exported(source, tmp_path / "out", precisions=["fp32", "int8"], calibration="default")
    rounded = Embedder(tmp_path / "out", precision="int8", threads=1)
    for role in ("query", "document"):
        one, other = (np.concatenate(encoded(model, role)) for model in (exact, rounded))
        found = cosines(one, other)
        assert found.mean() >= 0.999, (role, found.mean())


def _with_outliers(file: Path) -> None:
    """Makes two channels of the residual stream some 20 times the others."""
    tensors = load_file(file)
    for name, value in tensors.items():
        if name.endswith(("word_embeddings.weight", "tok_embeddings.weight")):
            value[:, [3, 17]] *= 20
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    folder = tmp_path_factory.mktemp("late")
    source = write_pylate(folder / "source", "bert")
    return exported(source, folder / "out", precisions=["fp32", "int8"])


@pytest.mark.parametrize("where", ["tokenizer_config.json", "tokenizer.json", "the arguments"])
def test_filling_before_a_query_is_refused(where: str, tmp_path: Path) -> None:
    """sentence-transformers fills on the side that the tokenizer pads."""
    expansion = {"query_expansion": {"strategy": "fixed", "attend": True, "length": 14}}
    given = {"processor_kwargs": {"padding_side": "left"}} if where == "the arguments" else {}
    source = write_native(tmp_path / "source", "bert", mask={}, transformer=expansion | given)
    padding: dict[str, Any] = {
        "direction": "Left",
        "strategy": "BatchLongest",
        "pad_to_multiple_of": None,
    }
    padding |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"}
    changes = {
        "tokenizer_config.json": {"padding_side": "left"},
        "tokenizer.json": {"padding": padding},
    }
    if where in changes:
        content = json.loads((source / where).read_text()) | changes[where]
        (source / where).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="14 tokens, and the tokenizer pads on the left"):
        exported(source, tmp_path / "out")


def test_a_length_without_room_for_a_text_is_refused(tmp_path: Path) -> None:
    source = write_native(tmp_path / "source", "bert", mask={}, transformer={"query_length": 1})
    with pytest.raises(CheckpointError, match="cut at 1 tokens.*expected a length of at least 2"):
        exported(source, tmp_path / "out")


def test_a_length_above_the_models_positions_is_refused(tmp_path: Path) -> None:
    source = write_native(tmp_path / "source", "bert", mask={}, transformer={"document_length": 99})
    with pytest.raises(CheckpointError, match="99 exceeds the 66 positions.*or document_length"):
        exported(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_length": 65}, "model.max_length: 64 is below the longest of late_interaction, 65"),
        ({"skipped_in": ["documents"]}, "skipped_in.0.: expected query or document, found 'doc"),
    ],
)
def test_rules_that_the_graphs_cannot_keep_are_refused(
    changes: dict[str, Any], message: str, bundle: Embedder
) -> None:
    document = json.loads((bundle._bundle.root / "manifest.json").read_text())
    document["model"]["late_interaction"] |= changes
    with pytest.raises(ManifestError, match=message):
        Manifest.from_dict(document)


def test_a_text_has_no_single_vector(bundle: Embedder) -> None:
    for encode in (bundle.encode, bundle.encode_query, bundle.encode_document):
        with pytest.raises(EmbedgeValueError, match="pass multi_vector=True to encode_query"):
            encode(["a"])


def test_the_manifest_says_the_rules(bundle: Embedder) -> None:
    model = json.loads((bundle._bundle.root / "manifest.json").read_text())["model"]
    assert model["late_interaction"] == {
        "query_length": 12,
        "document_length": 30,
        "text_length": 64,
        "expansion": {"length": 12, "token_id": 98, "attend": False},
        "skipped_ids": [4, 15, 17],
        "skipped_in": ["document"],
    }
    assert (model["pooling"], model["similarity"], model["dim"]) == ("none", "maxsim", 16)


def test_texts_without_tokens_of_their_own(bundle: Embedder) -> None:
    assert [len(rows) for rows in encoded(bundle, "query", ["", "a"])] == [12, 12]
    assert [len(rows) for rows in encoded(bundle, "document", ["", "..."])] == [3, 3]
    assert encoded(bundle, "document", []) == []


def test_a_query_that_is_cut_is_warned_of_by_its_own_limit(bundle: Embedder) -> None:
    long = "a" * 40
    with pytest.raises(EmbedgeValueError, match="longer than 12 tokens"):
        bundle.encode_query(long, multi_vector=True, on_truncate="error")
    with pytest.raises(EmbedgeValueError, match="longer than 30 tokens"):
        bundle.encode_document(long, multi_vector=True, on_truncate="error")
    rows = bundle.encode(long, multi_vector=True, on_truncate="error")
    assert np.shape(rows) == (42, 16)


def test_one_multi_vector_may_stand_alone_in_scores(bundle: Embedder) -> None:
    query, document = encoded(bundle, "query", ["ab"])[0], encoded(bundle, "document", ["b"])[0]
    assert bundle.similarity(query, [document]).shape == (1, 1)
    assert bundle.similarity(query, document)[0, 0] == pytest.approx(
        float((query @ document.T).max(1).sum()), rel=1e-5
    )


def test_the_commands_take_a_late_bundle(
    bundle: Embedder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = str(bundle._bundle.root)
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)))
    arguments = ["embed", root, "--precision", "fp32", "--input", str(lines), "--field", "text"]
    assert main(arguments) == 2
    assert "expected --role query or --role document" in capsys.readouterr().err
    for role in ("query", "document"):
        kind = tmp_path / f"{role}.json"
        options = ["--role", role, "--on-truncate", "ignore", "--fingerprint", str(kind)]
        assert main([*arguments, *options]) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["id"] for row in found] == list(range(len(TEXTS)))
        rows = [np.array(row["embedding"], np.float32) for row in found]
        assert_same(rows, encoded(bundle, role))
        bundle.check_fingerprint(
            json.loads(kind.read_text()), role=cast("Any", role), multi_vector=True
        )
    assert main([*arguments, "--role", "query", "--output", str(tmp_path / "v.npy")]) == 2
    assert "--format jsonl" in capsys.readouterr().err
    assert main(["inspect", root]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "truncation no multi-vectors 16" in out
    assert "queries 12 tokens, documents 30; queries filled up to 12; 3 tokens left out" in out
    assert main(["prepare", root, "--precision", "int8", "--pack-only"]) == 0


def test_fingerprints_of_a_card_and_of_inspect_are_those_of_its_calls(
    bundle: Embedder, capsys: pytest.CaptureFixture[str]
) -> None:
    root = bundle._bundle.root
    assert main(["inspect", str(root)]) == 0
    expected = {
        bundle.fingerprint(role=role, multi_vector=True) for role in (None, "query", "document")
    }
    assert len(expected) == 3
    assert bundle.fingerprint(multi_vector=True) in capsys.readouterr().out
    (code,) = re.findall(
        r"```python\n(from embedge.*?)```", (root / "README.md").read_text("utf-8"), re.DOTALL
    )
    exec(code.replace("path/to/this/folder", str(root)))
    assert bundle.fingerprint(role="document", multi_vector=True) in capsys.readouterr().out


_UNATTENDED = {"query_expansion": _FILLED}
REFUSED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "a causal model": (
        lambda f: write_native(f, "llama", transformer=_UNATTENDED, mask={}),
        {},
        "filled up to 14 tokens that no token attends to, and attention is causal",
    ),
    "a window": (
        lambda f: write_pylate(f, "modernbert"),
        {},
        "filled up to 12 tokens .* layers attend 3 tokens far: .* expected at most 4",
    ),
    "long queries": (
        lambda f: write_pylate(f, "bert", QUERY_LENGTH=600, max_position_embeddings=700),
        {},
        "filled up to 600 tokens that no token attends to; expected fewer than 512",
    ),
    "more than there are positions": (
        lambda f: write_pylate(f, "bert", DOCUMENT_LENGTH=100),
        {},
        "max length 100 exceeds the 66 positions",
    ),
    "a token that is not there": (
        lambda f: write_native(
            f, "bert", transformer={"query_expansion": {**_FILLED, "token": "zzz"}}, mask={}
        ),
        {},
        "expected the token 'zzz' of query_expansion",
    ),
    "widths that do not fit": (
        lambda f: _other_width(write_pylate(f, "bert")),
        {},
        "Dense layer 1 has in_features 16, expected 32",
    ),
    "a pooling": (lambda f: write_pylate(f, "bert"), {"pooling": "mean"}, "pooling 'mean': source"),
    "dimensions": (
        lambda f: write_pylate(f, "bert"),
        {"matryoshka_dims": [8]},
        r"matryoshka_dims \(8,\): source is a late-interaction model",
    ),
}


def _other_width(folder: Path) -> Path:
    config = {"in_features": 16, "out_features": 16, "bias": False}
    (folder / "1_Dense/config.json").write_text(json.dumps(config))
    save_file({"linear.weight": torch.ones(16, 16)}, folder / "1_Dense/model.safetensors")
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_graph_could_be_written_for_is_refused_by_name(case: str, tmp_path: Path) -> None:
    write, options, message = REFUSED[case]
    source = write(tmp_path / "source")
    with pytest.raises((CheckpointError, EmbedgeValueError), match=message):
        exported(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
