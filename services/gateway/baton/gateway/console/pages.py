"""The console's files, served from memory under a strict content security policy."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import Response

from baton.gateway.failures import HttpError

_FOLDER = Path(__file__).parent / "page"
_TYPES = MappingProxyType({
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
})
_HEADERS = MappingProxyType({
    # Only files of this gateway: no inline scripts or styles, no frames, no other hosts.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
})


class ConsolePages:
    """The console's page and its parts."""

    def __init__(self) -> None:
        self._files = {
            path.name: path.read_bytes()
            for path in sorted(_FOLDER.iterdir())
            if path.suffix in _TYPES
        }

    def get(self, request: Request) -> Response:
        """The file that the path names; index.html without a name."""
        name = request.path_params.get("name", "index.html")
        content = self._files.get(name)
        if content is None:
            raise HttpError(404, "no such path here", "not_found")
        tag = f'"{blake2b(content, digest_size=12).hexdigest()}"'
        headers = {**_HEADERS, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers={**headers, "content-type": _TYPES[Path(name).suffix]})
