"""How near a late-interaction bundle's vectors are to the unquantized model's, token by token.

``python -m embedge.bench.studies.late_interaction BUNDLE --reference MODEL``. The reference is
sentence-transformers' own ``MultiVectorEncoder`` in float32, a task's adapter applied by PEFT and left unmerged. The
bench's texts are embedded as queries and as documents. Shown are, for each task and precision:

* cosines of the vectors of all tokens, mean and lowest, of queries and of documents;
* *top-10*: how many of a query's ten best documents by MaxSim are the reference's, on average.

The last line is the same as one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.bench.errors import BenchArgumentError, BenchError
from embedge.bench.measure.texts import default_texts, subset
from embedge.bench.systems.backbone import adapter_folder, load_backbone
from embedge.bench.systems.source import model_folder
from embedge.quant.fidelity import cosine_rows
from embedge.runtime import Embedder, EmbedgeError
from embedge.runtime.bundle.folder import Bundle

__all__ = ["Closeness", "main", "measure"]

_ROLES = ("query", "document")
Rows = Sequence[NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """A task at a precision, beside the reference.

    Attributes:
        task: of the bundle.
        precision: of the bundle.
        texts: embedded in each role.
        query_mean: mean cosine of the vectors of queries' tokens.
        query_min: the lowest.
        document_mean: mean cosine of the vectors of documents' tokens.
        document_min: the lowest.
        top10_overlap: share of the ten best documents of a query, 0…1.
    """

    task: str
    precision: str
    texts: int
    query_mean: float
    query_min: float
    document_mean: float
    document_min: float
    top10_overlap: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="embedge.bench.studies.late_interaction",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--reference", required=True, help="folder of the model, or its hub id")
    parser.add_argument("--adapter", action="append", default=[], metavar="TASK=FOLDER")
    parser.add_argument("--limit", type=int, default=64, help="texts, of the bench's (64)")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    try:
        adapters = dict(_pair(text) for text in options.adapter)
        texts = [text.text for text in default_texts()]
        chosen = [texts[i] for i in subset(len(texts), options.limit)]
        found = list(
            measure(
                *(options.bundle, model_folder(options.reference), chosen, adapters),
                threads=options.threads,
            )
        )
    except EmbedgeError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    for one in found:
        print(
            f"{one.task} {one.precision}: queries {one.query_mean:.6f} (min {one.query_min:.6f}), documents "
            f"{one.document_mean:.6f} (min {one.document_min:.6f}), top-10 {one.top10_overlap:.3f}"
        )
    print(json.dumps([asdict(one) for one in found]))
    return 0


def measure(
    bundle: Path,
    reference: Path,
    texts: Sequence[str],
    adapters: Mapping[str, Path],
    *,
    threads: int | None = None,
) -> Iterator[Closeness]:
    """Yield the figures of every task and precision that runs on a CPU.

    Args:
        bundle: of a late-interaction model.
        reference: the model's folder.
        texts: at least ten.
        adapters: of the tasks that have one, folders in PEFT's format.
        threads: of the bundle's graphs.

    Raises:
        BenchError: the bundle is of another kind, an adapter is missing, or a text has not as many vectors as in the
            reference.
    """
    manifest = Bundle(bundle).manifest
    if manifest.model.late_interaction is None:
        raise BenchArgumentError(
            f"{bundle}: has a vector a text, expected a bundle of a late-interaction model; "
            f"embedge bench {bundle} --reference {reference} measures this one"
        )
    for task, settings in manifest.tasks.items():
        if (settings.adapter is not None) != (task in adapters):
            expected = "no adapter" if settings.adapter is None else f"--adapter {task}=FOLDER"
            raise BenchArgumentError(f"{bundle}: task {task}: expected {expected}")
        theirs = _Native(reference, adapters.get(task), task)
        expected_rows = {role: theirs.encode(texts, role) for role in _ROLES}
        expected_scores = theirs.scores(expected_rows)
        for precision, graphs in manifest.precisions.items():
            if "cpu" not in graphs.devices or task not in graphs.graphs:
                continue
            model = Embedder(bundle, precision=precision, task=task, device="cpu", threads=threads)
            by_role = {"query": model.encode_query, "document": model.encode_document}
            rows: dict[str, Any] = {
                role: by_role[role](list(texts), multi_vector=True, on_truncate="ignore")
                for role in _ROLES
            }
            query, document = (_cosines(rows[role], expected_rows[role], role) for role in _ROLES)
            scores = model.similarity(rows["query"], rows["document"])
            yield Closeness(
                task=task,
                precision=precision,
                texts=len(texts),
                query_mean=float(query.mean()),
                query_min=float(query.min()),
                document_mean=float(document.mean()),
                document_min=float(document.min()),
                top10_overlap=_overlap(scores, expected_scores),
            )


class _Native:
    """sentence-transformers' model, with a task's adapter.

    Args:
        folder: the model's.
        adapter: a folder in PEFT's format, or of several by their names; ``None`` for none.
        task: its name there.

    Raises:
        BenchError: sentence-transformers has no such class, or tensors of the adapter find no place.
    """

    def __init__(self, folder: Path, adapter: Path | None, task: str) -> None:
        import sentence_transformers

        library: Any = sentence_transformers  # whose version 5 lacks the class
        if not hasattr(library, "MultiVectorEncoder"):
            raise BenchError(
                f"sentence-transformers {library.__version__} has no MultiVectorEncoder, which is the reference; "
                'run: pip install "sentence-transformers>=6"'
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model = library.MultiVectorEncoder(str(folder), device="cpu")
        if adapter is not None:
            self._model[0].model = load_backbone(folder, adapter_folder(task, adapter))

    def encode(self, texts: Sequence[str], role: str) -> Rows:
        """Each text's vectors, float32 ``[tokens, dim]``."""
        calls = {"query": self._model.encode_query, "document": self._model.encode_document}
        rows: Rows = calls[role](list(texts), batch_size=8, convert_to_numpy=True)
        return rows

    def scores(self, rows: Mapping[str, Rows]) -> NDArray[np.float32]:
        """The similarity of each query to each document, as the model defines it."""
        return np.asarray(self._model.similarity(rows["query"], rows["document"]))


def _cosines(ours: Rows, theirs: Rows, role: str) -> NDArray[np.float64]:
    """Cosines of the vectors of all tokens."""
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one.shape != other.shape:
            raise BenchError(
                f"{role} {number}: expected {list(other.shape)} vectors and channels as the reference has, found "
                f"{list(one.shape)}; is the bundle of this model?"
            )
    return cosine_rows(np.concatenate(ours), np.concatenate(theirs))


def _overlap(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """The share of each row's ten highest that both have, on average."""
    best = (np.argsort(-scores, axis=1, kind="stable")[:, :10] for scores in (ours, theirs))
    return float(
        np.mean([len({*one} & {*other}) / len(one) for one, other in zip(*best, strict=True)])
    )


def _pair(text: str) -> tuple[str, Path]:
    task, found, folder = text.partition("=")
    if not (task and found and folder):
        raise BenchArgumentError(f"--adapter {text}: expected TASK=FOLDER")
    return task, Path(folder)


if __name__ == "__main__":
    sys.exit(main())
