"""Addresses of this machine: which they are, and that a request was meant for one.

A page of any site can give its own name the address 127.0.0.1 after it was loaded (DNS rebinding), and then send
requests to a server there as to its own. They carry that name in the header Host.
"""

from __future__ import annotations

import functools
import ipaddress

from embedge.runtime.server.errors import ApiError, shown

__all__ = ["check_local", "is_loopback"]


@functools.lru_cache(256)  # each request has one, and most the same
def is_loopback(host: str) -> bool:
    """Whether no other machine reaches a host's address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_local(host: str | None) -> None:
    """Refuses a request that was sent to another name than one of this machine's own.

    Args:
        host: the header Host, which browsers always send; ``None``: there is none.

    Raises:
        ApiError: 403.
    """
    if host is None:
        return
    name = host.strip().lower()
    inner = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if not is_loopback(inner.removesuffix(".")):
        raise ApiError(
            403,
            f"expected the header Host to be localhost or 127.0.0.1, found {shown(host)}; a server for other names "
            "needs --api-key-file, a proxy before this one has to send Host: localhost",
        )
