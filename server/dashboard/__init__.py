"""The aggregator's page: static files that show what the API answers to the admin key.

The page is public and holds no data: whoever has no key sees the box that asks for it. What it may do is fixed by its
Content-Security-Policy rather than by care alone: scripts from here only, no connection but to this aggregator and the model server it
names, and no string that a script could turn into markup (`require-trusted-types-for`), because names of devices are strangers' text.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response
from pydantic import BaseModel

FOLDER = Path(__file__).parent
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_ORIGIN = re.compile(r"https?://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?")  # nothing that could end a directive of the policy


class Attached(BaseModel):
    """What the page is told before it has a key."""

    model_server: str | None  # base URL of the OpenAI-compatible server that answers with base and adapter


@dataclass(frozen=True)
class Asset:
    """A file of the page, read once."""

    body: bytes
    media_type: str
    etag: str  # quoted


def _assets() -> dict[str, Asset]:
    found = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in MEDIA_TYPES:
            body = path.read_bytes()
            found[path.name] = Asset(body, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return found


def origin_of(url: str) -> str:
    """Scheme, host and port of a URL.

    >>> origin_of("http://127.0.0.1:8081/v1")
    'http://127.0.0.1:8081'

    Raises:
        ValueError: it is no plain http or https URL.
    """
    match = _ORIGIN.match(url)
    if match is None or url[match.end() : match.end() + 1] not in ("", "/"):
        raise ValueError(f"model server {url!r} is no URL; it should look like http://127.0.0.1:8081")
    return match.group()


def policy(model_server: str | None) -> str:
    """The Content-Security-Policy of the page."""
    connections = "'self'" if model_server is None else f"'self' {origin_of(model_server)}"
    return (
        f"default-src 'self'; connect-src {connections}; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def router(model_server: str | None = None) -> APIRouter:
    """Routes `/`, `/static/{name}` and `/v1/dashboard`.

    Raises:
        ValueError: `model_server` is no URL.
    """
    assets = _assets()
    page = assets.pop("page.html")
    headers = {
        "Content-Security-Policy": policy(model_server),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",  # kept, but asked for again each time: a new release is seen at once
    }
    routes = APIRouter()

    def answer(asset: Asset, request: Request) -> Response:
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        tagged = headers | {"ETag": asset.etag}
        if asset.etag in known or "*" in known:
            return Response(status_code=304, headers=tagged)
        return Response(asset.body, media_type=asset.media_type, headers=tagged)

    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    def dashboard(request: Request) -> Response:
        return answer(page, request)

    @routes.api_route("/static/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    def static(name: str, request: Request) -> Response:
        if name not in assets:
            raise HTTPException(404, f"The dashboard has no file {name!r}.")
        return answer(assets[name], request)

    @routes.get("/v1/dashboard", tags=["dashboard"])
    def attached() -> Attached:
        """What the dashboard shows besides this aggregator."""
        return Attached(model_server=model_server)

    return routes
