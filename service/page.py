"""The pages at `/`, to try it, and at `/docs`: files, with headers that allow them nothing but themselves.

Must not know what the pages show: they talk to the server as any other caller does.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

FOLDER = Path(__file__).parent / "web"
PAGES: Mapping[str, str] = MappingProxyType({"index.html": "/", "docs.html": "/docs"})
"""Where they are; what belongs to them is under /web/, as in the folder."""

CONTENT_TYPES: Mapping[str, str] = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml; charset=utf-8",
    }
)
"""By suffix; a file of another kind is not served."""

HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "cache-control": "no-cache",  # kept, but asked about each time: page and server are one version
        "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self' blob: data:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'; "
        "base-uri 'none'",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }
)


def routes() -> list[BaseRoute]:
    """One route for each file, all of which are read now: no path from outside ever reaches the file system.

    Raises:
        FileNotFoundError: a page is not part of this installation; install the package again.
    """
    files = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in CONTENT_TYPES]
    for name in PAGES:
        if FOLDER / name not in files:
            raise FileNotFoundError(f"{FOLDER / name} is missing: install the package again.")
    return [_route(path) for path in files]


def _route(path: Path) -> Route:
    content, name = path.read_bytes(), path.relative_to(FOLDER).as_posix()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "content-type": CONTENT_TYPES[path.suffix], "etag": etag}

    async def serve(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={**HEADERS, "etag": etag})
        return Response(content, headers=headers)

    return Route(PAGES.get(name, f"/web/{name}"), serve, methods=["GET"], include_in_schema=False)
