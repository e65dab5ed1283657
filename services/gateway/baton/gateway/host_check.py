"""Refuses requests whose Host header names a host that this gateway does not serve."""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.gateway.failures import HttpError, http_error_response


class HostCheck:
    """ASGI middleware against DNS rebinding.

    A web page whose domain resolves to 127.0.0.1 is of the gateway's own origin for the browser,
    but its requests still name that domain. So a gateway on a loopback address serves loopback
    names and those in `allowed`; on any other address it checks only if `allowed` names hosts.
    """

    def __init__(self, app: ASGIApp, http_host: str, allowed: Collection[str]) -> None:
        self._app = app
        self._allowed = frozenset(name.lower() for name in allowed)
        self._is_active = bool(allowed) or is_loopback(http_host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        host = Headers(scope=scope).get("host", "") if self._is_active else ""
        # Only clients of HTTP/1.0, which no browser is, send no Host.
        if host and not self._is_served(host):
            text = "this host name is not served here; see the setting allowed_hosts"
            response = http_error_response(HttpError(403, text, "host_not_allowed"))
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_served(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._allowed or is_loopback(name)


def is_loopback(host: str) -> bool:
    """True for localhost, its subdomains, and loopback addresses."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
