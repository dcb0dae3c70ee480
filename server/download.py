"""Bytes with an ETag: whole, from where a download stopped, or not at all when the client has them."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import Response

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def not_modified(request: Request, etag: str) -> Response | None:
    """The answer 304 where the client's copy is this one."""
    given = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    return Response(status_code=304, headers={"etag": etag}) if etag in given or "*" in given else None


def download(request: Request, data: bytes, etag: str, media_type: str, headers: dict[str, str] | None = None) -> Response:
    """The bytes, or the one range of them that was asked for; 416 where there is no such range (RFC 9110, section 14)."""
    common = {"etag": etag, "accept-ranges": "bytes", "x-content-type-options": "nosniff", **(headers or {})}
    same = not_modified(request, etag)
    if same is not None:
        return same
    asked = request.headers.get("range")
    condition = request.headers.get("if-range")
    if asked is None or (condition is not None and condition != etag):
        return Response(data, media_type=media_type, headers=common)
    match = _RANGE.fullmatch(asked.strip())
    if match is None or match.groups() == ("", ""):  # several ranges, or another unit: allowed to be ignored
        return Response(data, media_type=media_type, headers=common)
    first, last = match.groups()
    begin, end = (max(0, len(data) - int(last)), len(data)) if not first else (int(first), min(len(data), int(last) + 1 if last else len(data)))
    if begin >= end:
        return Response(status_code=416, headers={**common, "content-range": f"bytes */{len(data)}"})
    common["content-range"] = f"bytes {begin}-{end - 1}/{len(data)}"
    return Response(data[begin:end], status_code=206, media_type=media_type, headers=common)
