"""What the check of embedge's kernels looks at, and that it finds each wrong result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from embedge.runtime.bundle.operators import FUNCTIONS
from embedge.runtime.host.onnxruntime import open_session
from embedge.runtime.kernels import self_check
from tests.helpers.kernel import LIBRARY, needs_kernel

Array = NDArray[Any]
SIZES = 3  # numbers of rows


class Place(NamedTuple):
    """A result: of which session, of which of its runs, of which output."""

    session: int
    turn: int
    output: str


Spoil = Callable[[Place, Array], Array]


class Session:
    """A session whose results a function changes."""

    def __init__(self, session: Any, number: int, spoil: Spoil) -> None:
        self._session, self._number, self._spoil, self._turn = session, number, spoil, 0
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def run(self, names: list[str], inputs: dict[str, Array]) -> list[Array]:
        results = zip(names, self._session.run(names, inputs), strict=True)
        turn, self._turn = self._turn, self._turn + 1
        return [self._spoil(Place(self._number, turn, n), np.array(y)) for n, y in results]


def check() -> bool:
    assert LIBRARY is not None
    return self_check.is_right(LIBRARY)


def opened(patch: pytest.MonkeyPatch, spoil: Spoil = lambda place, y: y) -> list[onnx.ModelProto]:
    """The models that the check opens; results are what ``spoil`` makes of them."""
    models: list[onnx.ModelProto] = []

    def open_seen(model: bytes, *arguments: Any) -> Session:
        models.append(onnx.load_from_string(model))
        return Session(open_session(model, *arguments), len(models) - 1, spoil)

    patch.setattr(self_check, "open_session", open_seen)
    return models


@needs_kernel
def test_all_operators_are_tried_in_one_model_for_each_layout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = opened(monkeypatch)
    assert check()
    tried = [{(node.domain, node.op_type) for node in model.graph.node} for model in models]
    matmuls = {("com.microsoft", "MatMulIntegerToFloat"), ("com.microsoft", "MatMulNBits")}
    assert len(tried) == 2
    assert tried[0] == matmuls | set(FUNCTIONS)
    assert tried[1] == {operator for operator in tried[0] if "MatMul" in operator[1]}


def moved(output: str, y: Array) -> Array:
    """A result of which one value is another: by the least step where it is exact, else above its error."""
    last = tuple(size - 1 for size in y.shape)
    if y.dtype == np.uint8:
        y[last] += 1 if y[last] < 255 else -1
    elif output in ("causal", "padded", "full"):
        y[last] += 0.05
    elif output.startswith("silu"):
        y[last] += 0.005
    else:
        y[last] = np.nextafter(y[last], np.float32(np.inf))
    return y


def broken(output: str, y: Array) -> Array:
    """A result that holds a NaN, where it can."""
    y[(0,) * y.ndim] += 1 if y.dtype == np.uint8 else np.float32(np.nan)
    return y


def narrower(output: str, y: Array) -> Array:
    return y[..., :-1]


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize("change", [moved, broken, narrower])
def test_one_wrong_result_of_one_operator_is_found(
    change: Callable[[str, Array], Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        models = opened(patch)
        assert check()
    outputs = [
        (number, value.name) for number, model in enumerate(models) for value in model.graph.output
    ]
    assert len(outputs) == 43
    for count, (session, output) in enumerate(outputs):
        wrong = Place(session, count % SIZES, output)
        found: list[Place] = []

        def spoil(place: Place, y: Array, wrong: Place = wrong, found: Any = found) -> Array:
            if place != wrong:
                return y
            found.append(place)
            return change(place.output, y)

        with monkeypatch.context() as patch:
            opened(patch, spoil)
            assert not check(), wrong
        assert found == [wrong]


@needs_kernel
def test_weights_in_another_layout_than_the_session_says_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(self_check, "in_panels", lambda weight: weight)
    assert not check()
