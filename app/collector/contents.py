"""What a heartbeat contains and what happens to it, as a page and as JSON Schema."""

import json

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.collector.caching import HEADERS, etag, respond
from app.collector.rendering import Templates
from app.payload import NEWEST, all_fields, json_schema

HEARTBEAT, SCHEMA = "/heartbeat", "/v1/heartbeat.schema.json"
FOR_AN_HOUR = {**HEADERS, "Cache-Control": "public, max-age=3600"}


def routes(templates: Templates, retention_days: int) -> list[Route]:
    """Return the routes of both. They need no token, because they contain no number of installs.

    Heartbeats are stored for ``retention_days``; 0 means forever.
    """
    # The text between back quotes is code: every second part.
    purposes = {name: (field.description or "").split("`") for name, field in all_fields().items()}
    page = templates.heartbeat(purposes, retention_days=retention_days, schema=SCHEMA)
    schema = json.dumps(json_schema(NEWEST), indent=2)

    return [
        _static(HEARTBEAT, page.encode(), "text/html"),
        _static(SCHEMA, schema.encode(), "application/schema+json"),
    ]


def _static(path: str, body: bytes, media_type: str) -> Route:
    headers = {**FOR_AN_HOUR, "ETag": etag(body)}

    async def answer(request: Request) -> Response:
        return respond(request, body, headers, media_type)

    return Route(path, answer)
