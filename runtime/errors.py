"""What embedge refuses, as a small tree.

    EmbedgeError
    ├── EmbedgeValueError        an argument that cannot be used (also a ValueError)
    │   ├── TextTooLongError     a text that would be cut, under on_truncate="error"
    │   └── ImageError           an image that cannot be read, or has too many tokens
    ├── EmbedgeImportError       a package is missing or installed twice (also an ImportError)
    ├── BundleError              a bundle is missing, damaged, or not what its manifest says
    │   └── ManifestError        its manifest.json cannot be used
    ├── FingerprintError         vectors are of another kind than those that were stored
    ├── DeviceError              the device asked for does not work on this machine
    └── InferenceError           a graph failed, or gave something that is not a vector

    EmbedgeWarning               something was changed or left out (a UserWarning)

Each carries the names of the caller's arguments that its message mentions, where it mentions some.

``embedge.export`` adds its own branch below :class:`EmbedgeError`. Every message names the thing,
what was expected, what was found, and what to do next.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from types import FrameType

__all__ = [
    "BundleError",
    "DeviceError",
    "EmbedgeError",
    "EmbedgeImportError",
    "EmbedgeValueError",
    "EmbedgeWarning",
    "FingerprintError",
    "ImageError",
    "InferenceError",
    "ManifestError",
    "TextTooLongError",
    "log_info",
    "warn",
]


class _NamesArguments(Exception):
    """A message, and what of it names the caller's arguments.

    Args:
        message: what the exception says, or what a subclass makes its message of.
        arguments: such as ``batch_size`` or ``precision="auto"``, each as the message has it; the
            command puts its options there.
    """

    def __init__(self, *message: object, arguments: Iterable[str] = ()) -> None:
        super().__init__(*message)
        self.arguments = tuple(arguments)


class EmbedgeError(_NamesArguments):
    """Base of all errors that embedge raises on purpose."""


class EmbedgeValueError(EmbedgeError, ValueError):
    """An argument cannot be used; the message lists what can."""


class TextTooLongError(EmbedgeValueError):
    """A text has more tokens than the model takes, and was not to be cut.

    Args:
        index: the text's, in the call.
        max_length: tokens that the model takes.
    """

    def __init__(self, index: int, max_length: int) -> None:
        super().__init__(index, max_length, arguments=['on_truncate="ignore"'])
        self.index = index
        self.max_length = max_length

    def __str__(self) -> str:
        return (
            f"inputs[{self.index}] is longer than {self.max_length} tokens; shorten it, or pass "
            'on_truncate="ignore"'
        )


class ImageError(EmbedgeValueError):
    """One of a call's images cannot be used.

    Args:
        name: the argument it came in.
        index: the image's, in the call.
        reason: what is wrong with it, and what to do.
        arguments: that the reason names.
    """

    def __init__(
        self, name: str, index: int, reason: str, *, arguments: Iterable[str] = ()
    ) -> None:
        super().__init__(name, index, reason, arguments=arguments)
        self.name = name
        self.index = index
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}[{self.index}]: {self.reason}"


class EmbedgeImportError(EmbedgeError, ImportError):
    """A package that embedge needs is missing, or installed twice."""


class BundleError(EmbedgeError):
    """A bundle or one of its files is missing, damaged, or not what the manifest says."""


class ManifestError(BundleError):
    """A ``manifest.json`` cannot be used; the message holds the path of the bad key."""


class FingerprintError(EmbedgeError):
    """Vectors are of another kind than those that were stored.

    Args:
        message: what to say.
        differing: names of the parts that differ; none where the stored fingerprint does not tell.
    """

    def __init__(self, message: str, differing: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.differing = tuple(differing)


class DeviceError(EmbedgeError):
    """The device asked for does not work on this machine."""


class InferenceError(EmbedgeError):
    """A graph failed while running, or gave something that is not a vector."""


class EmbedgeWarning(_NamesArguments, UserWarning):
    """Something was changed, cut or left out; the call went on."""


def warn(message: str, *, arguments: Iterable[str] = ()) -> None:
    """Warns at the line that called embedge, however deep inside it this is."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("embedge."):
        level, frame = level + 1, frame.f_back
    warnings.warn(EmbedgeWarning(message, arguments=arguments), stacklevel=level)


def log_info(message: str, *arguments: object) -> None:
    """Tells the logger ``embedge.runtime`` something, at the level INFO."""
    logging = sys.modules.get("logging")  # slow to load; who reads what is logged has loaded it
    if logging is not None:
        logging.getLogger("embedge.runtime").info(message, *arguments)
