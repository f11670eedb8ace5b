"""The keys that requests have to carry, where there are some: ``Authorization: Bearer KEY``."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from embedge.runtime.server.errors import ApiError

__all__ = ["Keys"]


class Keys:
    """Keys that open a server; without any it is open.

    Only their digests are kept, and all of them are compared, so that the time tells nothing of them.

    Args:
        keys: of any length.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, authorization: str | None) -> None:
        """Refuses a request without a key.

        Args:
            authorization: the header of that name.

        Raises:
            ApiError: 401.
        """
        if not self._digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        known = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(known):
            found = "no key" if not authorization else "another"
            raise ApiError(
                401,
                f"expected the header Authorization: Bearer KEY with a key of this server, found {found}",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
