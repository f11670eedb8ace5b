"""What the hub's client answers or raises, as a result or as an error with what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

from embedge.runtime.errors import EmbedgeError

__all__ = ["asked"]

Result = TypeVar("Result")

_LOG_IN = "check the name, or log in with `hf auth login`"
# By the client's own errors.
_BY_ERROR = {
    "GatedRepoError": "accept its terms on its page, and log in with `hf auth login`",
    "RepositoryNotFoundError": f"the hub has no model of that id, or a private one: {_LOG_IN}",
    "RevisionNotFoundError": "name a branch, a tag or a commit that it has with --revision",
    "LocalTokenNotFoundError": "log in with `hf auth login`",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set: unset it",
}
_CHANGE = "change what it names, and run it again"
_BY_STATUS = {
    400: _CHANGE,
    401: _LOG_IN,
    403: _LOG_IN,
    422: _CHANGE,
    429: "wait, and run it again",
}
_NO_ROOM = "free some space, or set HF_HOME to a folder on another disk"
_NOT_WRITABLE = "set HF_HOME to a folder that you may write to"
_BY_ERRNO = {
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EACCES: _NOT_WRITABLE,
    errno.EPERM: _NOT_WRITABLE,
    errno.EROFS: _NOT_WRITABLE,
}
_QUERY = re.compile(r"(https?://[^\s?]+)\?[^\s)]*")  # of a signed URL: it lets who has it in


def asked(
    repo_id: str,
    ask: Callable[[], Result],
    advice: Mapping[str, str] = MappingProxyType({}),
) -> Result:
    """What the hub answers.

    Args:
        repo_id: what is asked about, for messages.
        ask: calls the client.
        advice: what to do, by the name of a client's error, where it differs from the usual.

    Raises:
        EmbedgeError: with its reason and what to do.
    """
    try:
        return ask()
    except EmbedgeError:
        raise
    except (
        Exception
    ) as error:  # the client raises its own, those of its HTTP library, and the system's
        what_to_do = advice.get(type(error).__name__) or _what_to_do(error)
        raise EmbedgeError(f"{repo_id}: {_reason(error)}; {what_to_do}") from error


def _reason(error: Exception) -> str:
    """What an error says: its first line, and what the hub adds to the status, without what signs a URL."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = (getattr(error, "server_message", None) or "").split("\n")[0].strip()
    words = [*lines[:1], said] if said and said not in lines[:1] else lines[:2]
    return _QUERY.sub(r"\1", ": ".join(words)) if words else type(error).__name__


def _what_to_do(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return (
        _BY_ERROR.get(type(error).__name__)
        or _BY_STATUS.get(status or 0)
        or _BY_ERRNO.get(getattr(error, "errno", None) or 0)
        or "check the network, and run it again"
    )
