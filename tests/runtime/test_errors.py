"""What errors and warnings carry besides their message."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from embedge.runtime import Embedder, EmbedgeError, EmbedgeValueError, EmbedgeWarning, ImageError
from embedge.runtime.errors import TextTooLongError


@pytest.mark.parametrize("method", ["encode", "encode_query", "encode_document"])
def test_a_warning_points_to_the_line_that_called_embedge(make_bundle: Any, method: str) -> None:
    model = Embedder(make_bundle(special_tokens=False).path)
    with pytest.warns(EmbedgeWarning) as said:
        getattr(model, method)(["", "w1 " * 20])
    assert [str(warning.message).split(" ")[0] for warning in said] == ["inputs[1]", "1"]
    assert {warning.filename for warning in said} == {__file__}


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"batch_size": 0}, ("batch_size",)),
        ({"on_truncate": "x"}, ("on_truncate",)),
        ({"truncate_dim": 99}, ("truncate_dim",)),
        ({"prompt_name": "x"}, ("prompt_name",)),
        ({"task": "x"}, ()),
    ],
)
def test_an_error_names_the_arguments_of_its_message(
    bundle: Any, options: dict[str, Any], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(EmbedgeValueError) as caught:
        Embedder(bundle.path).encode("w1", **options)
    assert caught.value.arguments == arguments
    assert all(argument in str(caught.value) for argument in arguments)


@pytest.mark.parametrize(
    "error",
    [
        EmbedgeError("a message", arguments=["batch_size"]),
        TextTooLongError(3, 16),
        ImageError("images", 3, "lower max_pixels", arguments=["max_pixels"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_to_other_processes(error: EmbedgeError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.arguments) == (str(error), error.arguments)
