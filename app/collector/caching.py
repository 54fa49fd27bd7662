"""The headers of what is public, and answers that a client may already have. Pure."""

import hashlib
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self';"
        " base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
PUBLIC = {"Cache-Control": "public, max-age=60"}
PRIVATE = {"Cache-Control": "private, max-age=60", "Vary": "Authorization"}
IMMUTABLE = {**HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
NO_STORE = {**HEADERS, "Cache-Control": "no-store"}


def etag(body: bytes) -> str:
    """Return the ETag of an answer."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def respond(request: Request, body: bytes, headers: Mapping[str, str], media_type: str) -> Response:
    """Return the answer, or 304 if the request says that it has the one with this ``ETag``."""
    if _has(request.headers.get("if-none-match", ""), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=media_type)


def _has(etags: str, etag: str) -> bool:
    """Return whether an ETag is among those of If-None-Match, by the weak comparison."""
    return any(each.strip().removeprefix("W/") in {etag, "*"} for each in etags.split(","))
