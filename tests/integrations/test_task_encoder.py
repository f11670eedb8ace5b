"""What all frameworks' classes hold, and what can be tested without the frameworks."""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import re
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedge.integrations.task_encoder import TaskEncoder
from embedge.runtime import (
    BundleError,
    Embedder,
    EmbedgeImportError,
    EmbedgeValueError,
    EmbedgeWarning,
    FingerprintError,
)
from embedge.runtime.kernels.numerics import CLASSES
from tests.helpers.documents import ROOT, read
from tests.integrations.conftest import DOCUMENTS, Expected, near
from tests.runtime.conftest import MULTI_DIM, TinyBundle, bundles_in

CODE = {"precision": "fp32", "task": "code"}
FRAMEWORKS = {
    "chroma": "chromadb",
    "haystack": "haystack",
    "langchain": "langchain_core",
    "llama_index": "llama_index",
}


def encoder(bundle: TinyBundle, **options: Any) -> TaskEncoder:
    return TaskEncoder(bundle.path, **{**CODE, **options})


class TestVectors:
    def test_queries_and_documents_have_their_prompts(
        self, bundle: TinyBundle, expected: Expected
    ) -> None:
        one = encoder(bundle)
        near(one.query("w1 w2"), expected.query("w1 w2"))
        near(one.queries(["w1 w2", "w3"]), [expected.query("w1 w2"), expected.query("w3")])
        near(one.documents(DOCUMENTS), expected.documents(DOCUMENTS))
        assert one.documents([]).shape == (0, 8)
        assert one.dim == 8

    def test_they_are_cut_to_a_length(self, bundle: TinyBundle) -> None:
        one, expected = encoder(bundle, truncate_dim=4), Expected(bundle, dim=4)
        near(one.query("w1"), expected.query("w1"))
        near(one.documents(DOCUMENTS), expected.documents(DOCUMENTS))
        assert one.dim == 4

    def test_prompts_given_win(self, bundle: TinyBundle, expected: Expected) -> None:
        one = encoder(bundle, prompts={"query": "w9 ", "document": ""})
        near(one.query("w1"), expected.vector("w9 w1"))
        near(one.documents(["w1"]), [expected.vector("w1")])

    def test_queries_may_have_a_task_of_their_own(
        self, bundle: TinyBundle, expected: Expected
    ) -> None:
        one = encoder(bundle, query_task="retrieval")
        near(one.query("w1"), Expected(bundle, "retrieval").query("w1"))
        near(one.documents(["w1"]), expected.documents(["w1"]))
        again = pickle.loads(pickle.dumps(one))
        assert (again.task, again.query_task) == ("code", "retrieval")
        assert encoder(bundle).fingerprint == one.fingerprint

    def test_threads_get_their_own(self, bundle: TinyBundle, expected: Expected) -> None:
        one = encoder(bundle)
        texts = [f"w{i % 50} w{i % 7}" for i in range(200)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(one.query, texts))
        near(np.stack(found), np.stack([expected.query(text) for text in texts]))


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"task": "nonsense"}, "no task 'nonsense'; it has retrieval, code"),
            ({"task": None}, "several tasks: retrieval, code"),
            ({"query_task": "nonsense"}, "no task 'nonsense'"),
            ({"precision": "int2"}, "no precision 'int2'"),
            ({"precision": None}, "several precisions: fp32, int4"),
            ({"truncate_dim": 3}, "truncate_dim is 3"),
            ({"device": "tpu"}, "tpu"),
            ({"batch_size": 0}, "batch_size"),
            ({"on_truncate": "shout"}, "on_truncate"),
            ({"threads": 0}, "threads"),
            ({"normalize_embeddings": 1}, "normalize_embeddings"),
            ({"prompts": {"query": 3}}, "prompts"),
        ],
    )
    def test_a_wrong_option_is_an_error_at_once(
        self, bundle: TinyBundle, options: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(EmbedgeValueError, match=re.escape(named)):
            encoder(bundle, **options)

    def test_so_is_an_unknown_one_or_a_missing_bundle(
        self, bundle: TinyBundle, tmp_path: Path
    ) -> None:
        with pytest.raises(TypeError, match=r"unexpected options: truncate_dims; there are: .*tru"):
            encoder(bundle, truncate_dims=4)
        with pytest.raises(BundleError, match="nowhere"):
            TaskEncoder(tmp_path / "nowhere")
        for wrong in (None, 3, b"bundle"):
            with pytest.raises(EmbedgeValueError, match="expected the path of a bundle's folder"):
                TaskEncoder(wrong)  # type: ignore[arg-type]

    @pytest.mark.parametrize("task", ["retrieval.passage", "retrieval.query"])
    def test_a_task_of_documents_alone_is_not_taken_for_queries(
        self, task: str, tmp_path: Path
    ) -> None:
        both = {"task": "retrieval.passage", "query_task": "retrieval.query"}
        tiny = bundles_in(tmp_path)("v3", tasks=("retrieval.query", "retrieval.passage", "code"))
        with pytest.raises(EmbedgeValueError, match=r'passage" and query_task="retrieval\.query"'):
            TaskEncoder(tiny.path, task=task)
        one = TaskEncoder(tiny.path, **both)  # type: ignore[arg-type]
        near(one.query("w1"), Expected(tiny, "retrieval.query").vector("w1"))
        near(one.documents(["w1"]), [Expected(tiny, "retrieval.passage").vector("w1")])
        assert TaskEncoder(tiny.path, task=task, query_task=task).query_task == task
        assert TaskEncoder(tiny.path, task="code").query_task == "code"

    def test_a_model_of_a_vector_a_token_is_refused_at_once(self, tmp_path: Path) -> None:
        rules: dict[str, Any] = {"query_length": 6, "document_length": 8, "text_length": 7}
        rules |= {"expansion": None, "skipped_ids": [], "skipped_in": []}
        model = {"late_interaction": rules, "similarity": "maxsim", "dim": MULTI_DIM}
        late = bundles_in(tmp_path)("late", multi_vector=True, model=model)
        with pytest.raises(EmbedgeValueError, match="multi_vector"):
            TaskEncoder(late.path)

    def test_what_is_no_text_is_named(self, bundle: TinyBundle) -> None:
        one = encoder(bundle)
        with pytest.raises(EmbedgeValueError, match=r"inputs\[1\].* found int"):
            one.documents(["w1", 3])  # type: ignore[list-item]
        with pytest.raises(EmbedgeValueError, match="found one string; put it into a list"):
            one.documents("w1")
        with pytest.raises(EmbedgeValueError, match="expected a string, found list"):
            one.query(["w1"])  # type: ignore[arg-type]

    def test_an_image_is_no_text_for_a_bundle_that_takes_both(self, tmp_path: Path) -> None:
        tiny = bundles_in(tmp_path)("images", images=True)
        with pytest.raises(EmbedgeValueError, match=r"inputs\[0\].* string"):
            TaskEncoder(tiny.path).documents([b"\x89PNG"])  # type: ignore[list-item]


class TestSharing:
    def test_encoders_that_are_opened_alike_share_an_embedder(self, bundle: TinyBundle) -> None:
        one = encoder(bundle)
        assert encoder(bundle, task="retrieval", truncate_dim=4).embedder is one.embedder
        assert encoder(bundle, device="auto", threads=None).embedder is one.embedder
        assert encoder(bundle, precision="int4").embedder is not one.embedder
        assert encoder(bundle, prompts={"query": ""}).embedder is not one.embedder
        assert encoder(bundle, threads=1).embedder is not one.embedder

    def test_automatic_precision_shares_with_what_it_takes(self, tmp_path: Path) -> None:
        tiny = bundles_in(tmp_path)("one", precisions={"fp32": {}})
        named = TaskEncoder(tiny.path, precision="fp32")
        automatic = TaskEncoder(tiny.path, precision="auto")
        assert automatic.embedder is named.embedder
        assert automatic.options["precision"] == "fp32"

    def test_threads_open_one(self, tmp_path: Path) -> None:
        tiny = bundles_in(tmp_path)("one")
        with ThreadPoolExecutor(8) as pool:
            opened = list(pool.map(lambda _: TaskEncoder(tiny.path), range(32)))
        assert len({id(one.embedder) for one in opened}) == 1

    def test_what_no_one_holds_is_given_back(self, tmp_path: Path) -> None:
        from embedge.integrations import task_encoder

        tiny = bundles_in(tmp_path)("one")
        one = TaskEncoder(tiny.path)
        assert any(one.embedder is held for held in task_encoder._embedders.values())
        name = str(tiny.path)
        del one
        gc.collect()
        assert not [key for key in task_encoder._embedders if name in key]

    def test_a_replaced_bundle_is_opened_anew(self, tmp_path: Path) -> None:
        tiny = bundles_in(tmp_path)("one", tasks=("retrieval",))
        other = bundles_in(tmp_path)("other", tasks=("clustering",))
        one = TaskEncoder(tiny.path)
        os.rename(tiny.path, tmp_path / "old")
        os.rename(other.path, tiny.path)
        two = TaskEncoder(tiny.path)
        assert two.embedder is not one.embedder
        assert (one.task, two.task) == ("retrieval", "clustering")

    def test_a_pickle_opens_the_same(self, bundle: TinyBundle, expected: Expected) -> None:
        one = encoder(bundle, truncate_dim=8, batch_size=2)
        two = pickle.loads(pickle.dumps(one))
        assert two.embedder is one.embedder  # in one process
        assert (two.task, two.dim, two.options) == (one.task, one.dim, one.options)
        near(two.documents(DOCUMENTS), expected.documents(DOCUMENTS))

    def test_a_pickle_of_another_bundle_is_refused(self, tmp_path: Path) -> None:
        tiny = bundles_in(tmp_path)("one", tasks=("retrieval",))
        other = bundles_in(tmp_path)("other", tasks=("retrieval",), special_tokens=False)
        data = pickle.dumps(TaskEncoder(tiny.path))
        os.rename(tiny.path, tmp_path / "old")
        os.rename(other.path, tiny.path)
        with pytest.raises(FingerprintError, match="tokenizer: "):
            pickle.loads(data)


class TestFingerprints:
    def test_it_is_the_documents(self, bundle: TinyBundle) -> None:
        one = encoder(bundle, truncate_dim=4)
        embedder = Embedder(bundle.path, precision="fp32", task="code", truncate_dim=4)
        assert one.fingerprint == embedder.fingerprint(role="document")
        assert one.prompts_differ()
        one.check_fingerprint(embedder.fingerprint(role="document"))
        one.check_fingerprint(embedder.fingerprint_parts(role="document"))

    @pytest.mark.parametrize(
        ("options", "differing"),
        [
            ({"task": "retrieval"}, {"graph"}),
            ({"truncate_dim": 2}, {"dim"}),
            ({"prompts": {"document": "w1 "}}, {"prompt"}),
        ],
    )
    def test_another_kind_is_refused_at_once(
        self, bundle: TinyBundle, options: dict[str, Any], differing: set[str]
    ) -> None:
        one = encoder(bundle)
        parts = one.embedder.fingerprint_parts(task="code", role="document")
        encoder(bundle, fingerprint=parts)
        with pytest.raises(FingerprintError) as raised:
            encoder(bundle, **options, fingerprint=parts)
        assert set(raised.value.differing) == differing

    def test_another_machines_arithmetic_alone_is_a_warning(self, bundle: TinyBundle) -> None:
        one = encoder(bundle)
        parts = one.embedder.fingerprint_parts(task="code", role="document")
        [other, *_] = [name for name in CLASSES if name != parts["numerics"]]
        with pytest.warns(EmbedgeWarning, match=f'numerics: "{other}" stored'):
            one.check_fingerprint(parts | {"numerics": other})
        with pytest.raises(FingerprintError):
            one.check_fingerprint(parts | {"numerics": other, "dim": 4})

    def test_without_prompts_queries_are_documents(self, tmp_path: Path) -> None:
        assert not TaskEncoder(bundles_in(tmp_path)("one").path).prompts_differ()


@pytest.mark.parametrize(("module", "framework"), FRAMEWORKS.items())
def test_a_missing_framework_is_named_with_its_command(
    module: str, framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"embedge.integrations.{module}", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == framework]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, framework, None)
    with pytest.raises(
        EmbedgeImportError, match=rf"integrations\.{module} .*{framework}.*pip inst"
    ):
        importlib.import_module(f"embedge.integrations.{module}")


def test_versions_tested_are_within_those_asked_for_and_in_the_guides() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    lines = (ROOT / "tests/integrations/requirements.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for extra in (name.replace("_", "-") for name in FRAMEWORKS):
        [requirement] = map(Requirement, extras[extra])
        assert requirement.specifier.contains(pinned[requirement.name])
    table = read("docs/guides/frameworks.md") + read("docs/guides/vector-databases.md")
    shown = dict(re.findall(r"^\|[^|]*\| `([\w-]+)` \| ([\d.]+) \|", table, flags=re.M))
    assert shown == {name: version for name, version in pinned.items() if name in shown}
    assert {*pinned} - {*shown} == {"psycopg-binary"}
