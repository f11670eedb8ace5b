"""What holds for every manifest: it is written as it was read, and what is wrong in it is named."""

from __future__ import annotations

import json
import random
import re
import warnings
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from embedge.runtime import ManifestError
from embedge.runtime.bundle.contract import FORMAT_VERSION
from embedge.runtime.bundle.json_object import parse_json
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.bundle.schema import Since
from tests.fuzz.mutate import mutate_json
from tests.helpers.images import SETTINGS
from tests.runtime.bundle.test_manifest import with_images

few = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)

names = st.sampled_from(["a", "B-1", "c.x", "0_" + "d" * 62])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
hashes = st.integers(0, (1 << 256) - 1).map("{:064x}".format)
free = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """A manifest as this version writes it."""
    dim = draw(st.integers(1, 5000))
    smaller = st.integers(1, dim)
    images = draw(st.booleans())
    inputs = ["input_ids", "attention_mask", *draw(st.sampled_from([[], ["token_type_ids"]]))]
    inputs += ["position_ids", "pool_mask", "image_features", "image_positions"] if images else []
    tasks = draw(st.dictionaries(names, task(), min_size=1, max_size=3))
    files = {"tokenizer.json": draw(entries())}
    precisions: dict[str, Any] = {}
    for precision in draw(st.lists(names, min_size=1, max_size=2, unique=True)):
        chosen = draw(st.lists(st.sampled_from(sorted(tasks)), unique=True))
        paths = {
            kind: {t: f"{precision}/{t}.{kind}" for t in chosen} for kind in ("graphs", "layers")
        }
        vision = f"{precision}/vision.onnx" if images and draw(st.booleans()) else None
        listed = [
            *paths["graphs"].values(),
            *paths["layers"].values(),
            *([vision] if vision else []),
        ]
        files |= {path: draw(entries()) for path in listed}
        precisions[precision] = {
            "graphs": paths["graphs"],
            "vision": vision,
            "devices": draw(st.lists(texts, max_size=2)),
            "row_multiple": draw(st.integers(1, 4096)),
            "activation_constants": draw(st.dictionaries(texts, constants(), max_size=2)),
            "options": draw(st.dictionaries(texts, free, max_size=2)),
            "layers": paths["layers"],
            "fidelity": draw(st.dictionaries(texts, free, max_size=2)),
            **({"unpack": paths["layers"]} if draw(st.booleans()) and chosen else {}),
        }
    return {
        "format_version": draw(st.sampled_from(["1.0", FORMAT_VERSION])),
        "producer": {"name": draw(texts), "version": draw(texts)},
        "source": {
            "name": draw(texts),
            "model_type": draw(texts),
            "license": draw(optional(texts)),
            "sha256": draw(optional(hashes)),
            **draw(st.sampled_from([{}, {"graph_sha256": "a"}, {"dense_sha256": "b"}])),
        },
        "model": {
            "dim": dim,
            "pooling": draw(texts),
            "normalize": draw(st.booleans()),
            "max_length": draw(st.integers(1, 1 << 20)),
            "matryoshka_dims": draw(optional(st.lists(smaller, max_size=3))),
            "truncate_dim": draw(optional(smaller)),
            "multi_vector_dim": draw(optional(st.integers(1, 512))),
            "modalities": ["text", "image"] if images else ["text"],
            "inputs": inputs,
            "similarity": draw(st.sampled_from(["cosine", "dot"])),
            "image": SETTINGS.to_dict() if images else None,
            **draw(st.sampled_from([{}, {"include_prompt": False}])),
        },
        "tokenizer": {
            "file": "tokenizer.json",
            "pad_token_id": draw(st.integers(0, 1 << 20)),
            "append_eos_token_id": draw(optional(st.integers(0, 9))),
            "truncation_side": draw(st.sampled_from(["right", "left"])),
            **draw(st.sampled_from([{}, {"table_rows": 30522}])),
        },
        "tasks": tasks,
        "precisions": precisions,
        "files": files,
    }


@st.composite
def task(draw: st.DrawFn) -> dict[str, Any]:
    prompts = draw(st.dictionaries(texts, texts, max_size=2))
    adapter = {"name": draw(optional(texts)), "sha256": None, "base_model": draw(optional(texts))}
    own = draw(st.sampled_from([{}, {"own_prompts": True}]))
    return {
        "prompts": prompts,
        "default_prompt": draw(st.sampled_from([None, *prompts])),
        "adapter": draw(st.sampled_from([None, {**adapter, **own}])),
    }


@st.composite
def constants(draw: st.DrawFn) -> dict[str, Any]:
    numbers = {
        "float32": st.floats(-3e38, 3e38) | st.integers(-9, 9),
        "uint8": st.integers(0, 255),
        "int8": st.integers(-128, 127),
    }
    dtype = draw(st.sampled_from(sorted(numbers)))
    return {"dtype": dtype, "full": draw(numbers[dtype]), "reduced": draw(numbers[dtype])}


def entries() -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(st.integers(0, 1 << 40), hashes).map(
        lambda drawn: {"size": drawn[0], "sha256": drawn[1]}
    )


@pytest.mark.slow
@few
@given(documents())
def test_a_manifest_is_written_as_it_was_read(document: dict[str, Any]) -> None:
    written = Manifest.from_dict(document).to_dict()
    assert json.dumps(written) == json.dumps(document)


@pytest.mark.slow
@few
@given(documents(), st.integers(0, 1 << 32), st.integers(1, 3))
def test_a_changed_manifest_is_read_or_refused_with_the_path_of_a_key(
    document: dict[str, Any], seed: int, changes: int
) -> None:
    rng = random.Random(seed)
    changed: Any = document
    for _ in range(changes):
        changed, _ = mutate_json(changed, rng)
    try:
        changed = parse_json(json.dumps(changed).encode())
    except ValueError:  # no JSON by embedge's rules, which `read_json_object` names
        return
    problem, manifest = parsed(changed)
    if manifest is None:
        assert re.match(r"manifest\.json: \S", problem)
        return
    written = manifest.to_dict()
    assert parsed(written) == ("", manifest)
    assert json.dumps(Manifest.from_dict(written).to_dict()) == json.dumps(written)


def parsed(document: Any) -> tuple[str, Manifest | None]:
    """What is wrong with a document, or its manifest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "", Manifest.from_dict(document)
        except ManifestError as error:
            return str(error), None


@pytest.mark.slow
def test_documents_of_earlier_versions_lack_what_came_later_and_are_read() -> None:
    """Every member with a version has a default, and takes it where an older document lacks the key."""
    for version in ("1.0", "1.1", "1.2", "1.3"):
        document = with_images()
        parts: list[tuple[dict[str, Any], Any]] = [
            (document[name], type(getattr(Manifest.from_dict(document), name)))
            for name in ("source", "model", "tokenizer")
        ]
        precision = document["precisions"]["int8"]
        parts.append((precision, type(Manifest.from_dict(document).precisions["int8"])))
        dropped = {}
        for values, cls in parts:
            for field in fields(cls):
                rules = getattr(
                    get_type_hints(cls, include_extras=True)[field.name], "__metadata__", ()
                )
                if any(isinstance(rule, Since) and rule.version > version for rule in rules):
                    values.pop(field.name, None)
                    made = field.default_factory
                    dropped[cls, field.name] = field.default if made is MISSING else made()
        if version < "1.1":  # whose models have no images
            document["model"]["modalities"] = ["text"]
            document["model"]["inputs"] = ["input_ids", "attention_mask"]
        manifest = Manifest.from_dict({**document, "format_version": version})
        found: dict[Any, Any] = {
            type(o): o for o in (manifest.source, manifest.model, manifest.tokenizer)
        }
        found |= {type(p): p for p in manifest.precisions.values()}
        assert dropped
        assert {key: getattr(found[key[0]], key[1]) for key in dropped} == dropped
