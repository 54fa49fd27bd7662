"""The OpenAPI 3.1 description of the collector. Pure."""

import json
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from app.collector.badge import CACHE_SECONDS
from app.collector.bounded import WITHIN_SECONDS
from app.collector.contents import HEARTBEAT, SCHEMA
from app.collector.events import AT_MOST as MOST_EVENTS
from app.collector.health import EVERY_SECONDS
from app.collector.holdings import AT_MOST, Held
from app.collector.intake import MAX_BODY_BYTES, MAX_DETAILS, NEWER_SCHEMA_SECONDS
from app.collector.rounding import FEW, FOLD_BELOW, ROUNDED_TO
from app.collector.stats import Stats
from app.payload import NEWEST, Edition
from app.payload import SCHEMAS as HEARTBEATS

Described = dict[str, Any]

JSON_TYPE = "application/json"
SVG, ATOM = "image/svg+xml", "application/atom+xml"
SCHEMAS = "#/components/schemas/"
RETRY_AFTER = {
    "Retry-After": {
        "description": "Whole seconds to wait before the next try.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    }
}
DETAIL = {
    "type": "object",
    "properties": {"field": {"type": "string"}, "problem": {"type": "string"}},
    "required": ["field", "problem"],
    "additionalProperties": False,
}
ERROR = {
    "type": "object",
    "properties": {
        "error": {"type": "string", "description": "A sentence without a value of the request."},
        "details": {
            "description": "What is wrong where in a body.",
            "type": "array",
            "maxItems": MAX_DETAILS,
            "items": DETAIL,
        },
    },
    "required": ["error"],
    "additionalProperties": False,
}
NO_STORE = {
    "Cache-Control": {"required": True, "schema": {"const": "no-store"}},
}
NOTHING = {
    "type": "object",
    "properties": {
        "error": {"type": "string"},
        "retention_days": {"type": "integer", "minimum": 0},
    },
    "required": ["error", "retention_days"],
    "additionalProperties": False,
}
ALIVE = {
    "type": "object",
    "properties": {"alive": {"const": True}},
    "required": ["alive"],
    "additionalProperties": False,
}
READY = {
    "type": "object",
    "properties": {"ready": {"const": True}},
    "required": ["ready"],
    "additionalProperties": False,
}
NOT_READY = {
    "type": "object",
    "properties": {
        "ready": {"const": False},
        "reasons": {
            "description": "Sentences for an operator, without a host, a user or a password.",
            "type": "array",
            "minItems": 1,
            "items": {"type": "string"},
        },
    },
    "required": ["ready", "reasons"],
    "additionalProperties": False,
}
BADGE = {
    "description": "What the endpoint badge of shields.io reads.",
    "type": "object",
    "properties": {
        "schemaVersion": {"const": 1},
        "label": {"type": "string", "minLength": 1},
        "message": {"type": "string", "minLength": 1},
        "color": {"type": "string", "pattern": "^[0-9a-f]{6}$"},
        "isError": {"description": "Whether the number is old.", "type": "boolean"},
        "cacheSeconds": {"type": "integer", "minimum": CACHE_SECONDS},
    },
    "required": ["schemaVersion", "label", "message", "color", "isError", "cacheSeconds"],
    "additionalProperties": False,
}
# An empty parameter counts as missing: a form sends its empty fields too.
FILTERS = [
    {
        "name": "days",
        "in": "query",
        "description": "How many days, up to the last one that was counted.",
        "schema": {"type": "string", "enum": ["", "30", "90", "365"], "default": "90"},
    },
    {
        "name": "version",
        "in": "query",
        "description": "Only installs of this version.",
        "schema": {"anyOf": [{"$ref": f"{SCHEMAS}Version"}, {"const": ""}]},
    },
    {
        "name": "edition",
        "in": "query",
        "description": "Only installs of this edition.",
        "schema": {"type": "string", "enum": ["", *get_args(Edition)]},
    },
]
KNOWN_ALREADY = {
    "name": "If-None-Match",
    "in": "header",
    "description": "The ETag of an answer that the client has.",
    "schema": {"type": "string"},
}
CACHING = {
    "ETag": {"required": True, "schema": {"type": "string"}},
    "Cache-Control": {
        "description": "Private where COLLECTOR_TOKEN is set.",
        "required": True,
        "schema": {"type": "string", "enum": ["public, max-age=60", "private, max-age=60"]},
    },
}
AFTER = {
    "name": "after",
    "in": "query",
    "description": "Only heartbeats sent later: the `sent_at` of the last one that the client has.",
    "schema": {"$ref": f"{SCHEMAS}SentAt"},
}
INSTANCE = {
    "name": "instance_id",
    "in": "path",
    "required": True,
    "schema": {"$ref": f"{SCHEMAS}InstanceId"},
}


def document() -> Described:
    """Return the description of every route, except for the style of the page."""
    heartbeats = _heartbeats()
    stats, parts = _schema(TypeAdapter(Stats).json_schema(mode="serialization"))
    held, parts_of_held = _schema(TypeAdapter(Held).json_schema(mode="serialization"))
    fields = heartbeats[NEWEST.__name__]["properties"]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ConsentOS telemetry collector",
            "version": "1",
            "description": (
                "Accepts heartbeats, and shows how many installs there are. A path outside of"
                " /v1/ may answer an error with an HTML page instead of JSON, if Accept prefers"
                " text/html."
            ),
        },
        "paths": {
            "/v1/heartbeat": {"post": _store()},
            "/v1/installs/{instance_id}": {"get": _read_held(), "delete": _forget()},
            "/v1/stats.json": {"get": _numbers("json", {JSON_TYPE: _ref("Stats")}, JSON_TYPE)},
            "/v1/stats.csv": {"get": _numbers("csv", {"text/csv": _text()}, "text/plain")},
            "/": {"get": _numbers("page", {"text/html": _text()}, "text/html")},
            "/badge.svg": {"get": _badge("svg", {SVG: _text()}, SVG)},
            "/v1/badge.json": {"get": _badge("json", {JSON_TYPE: _ref("Badge")}, JSON_TYPE)},
            "/feed.atom": {"get": _feed()},
            "/healthz": {"get": _alive()},
            "/readyz": {"get": _ready()},
            HEARTBEAT: {"get": _contents("page", "text/html")},
            SCHEMA: {"get": _contents("schema", "application/schema+json")},
            "/v1/openapi.json": {
                "get": {
                    "summary": "Read this description",
                    "operationId": "describe",
                    "responses": {
                        "200": {
                            "description": "This.",
                            "content": {JSON_TYPE: {"schema": {"type": "object"}}},
                        }
                    },
                }
            },
        },
        "components": {
            "schemas": {
                **heartbeats,
                **parts,
                **parts_of_held,
                "Heartbeat": {"oneOf": [_ref_to(model.__name__) for model in HEARTBEATS.values()]},
                "Held": held,
                "Nothing": NOTHING,
                "Alive": ALIVE,
                "Ready": READY,
                "NotReady": NOT_READY,
                "Stats": stats,
                "Badge": BADGE,
                "Error": ERROR,
                "InstanceId": fields["instance_id"],
                "SentAt": fields["sent_at"],
                "Version": fields["version"],
            },
            "securitySchemes": {
                "basic": {
                    "type": "http",
                    "scheme": "basic",
                    "description": "COLLECTOR_TOKEN as the password, where it is set.",
                },
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _heartbeats() -> Described:
    """Return the JSON Schema of each schema's heartbeat, and of their parts, by their names."""
    _, found = models_json_schema(
        [(model, "validation") for model in HEARTBEATS.values()],
        ref_template=f"{SCHEMAS}{{model}}",
    )
    definitions: Described = found["$defs"]
    return definitions


def _schema(schema: Mapping[str, Any]) -> tuple[Described, Described]:
    """Return a JSON Schema and its definitions, with references that fit this document."""
    moved: Described = json.loads(json.dumps(schema).replace('"#/$defs/', f'"{SCHEMAS}'))
    moved.pop("$schema", None)
    return moved, moved.pop("$defs")


def _store() -> Described:
    return {
        "summary": "Store a heartbeat",
        "description": (
            f"One of at most {MAX_BODY_BYTES} bytes. The same one (`instance_id`, `sent_at`) may be"
            " sent again: it is stored once."
        ),
        "operationId": "store",
        "requestBody": {"required": True, "content": {JSON_TYPE: _ref("Heartbeat")}},
        "responses": {
            "202": {"description": "It is stored: committed, and safe from a crash."},
            "400": _error(
                "The body is not a heartbeat of a telemetry_schema that this collector supports, or"
                " its `instance_id` is the nil or the max UUID."
            ),
            "408": _error("The body did not arrive in time."),
            "413": _error("The body is too large."),
            "415": _error("The body is not application/json, or is compressed."),
            **_may_fail(),
            "429": _error(
                "The client has sent too many requests, or heartbeats of too many installs today.",
                RETRY_AFTER,
            ),
            "503": _error(
                "It may not be stored, or its install was deleted a moment ago, or it has a newer"
                " telemetry_schema than this collector supports (then Retry-After is"
                f" {NEWER_SCHEMA_SECONDS}): try again.",
                RETRY_AFTER,
            ),
        },
    }


def _read_held() -> Described:
    return {
        "summary": "Read what is held of an install",
        "description": (
            "Each heartbeat with the time of its receipt and its canonical body, in the order of"
            f" `sent_at`, at most {AT_MOST} of them. Anyone who knows the id may read them."
        ),
        "operationId": "read_held",
        "parameters": [INSTANCE, AFTER],
        "responses": {
            "200": {
                "description": "What is held, without the heartbeats that `after` excludes.",
                "headers": NO_STORE,
                "content": {JSON_TYPE: _ref("Held")},
            },
            "400": _error(
                "The id is not a UUID in lower case with its hyphens, or `after` is not a time."
            ),
            "404": {
                "description": "Nothing is held under the id.",
                "headers": NO_STORE,
                "content": {JSON_TYPE: _ref("Nothing")},
            },
            **_may_fail(),
            "500": _error("The collector failed."),
            "503": _error("The database is not available: try again.", RETRY_AFTER),
        },
    }


def _forget() -> Described:
    return {
        "summary": "Delete an install",
        "description": "Delete everything stored under its id. Anyone who knows the id may do so.",
        "operationId": "forget",
        "parameters": [INSTANCE],
        "responses": {
            "204": {"description": "Nothing is stored under the id any more, or nothing ever was."},
            "400": _error("It is not a UUID in lower case with its hyphens."),
            **_may_fail(),
        },
    }


def _may_fail() -> Described:
    return {
        "429": _error("The client has sent too many requests.", RETRY_AFTER),
        "500": _error("The collector failed, or the database rejects the value."),
        "503": _error("It may not be stored or deleted: try again.", RETRY_AFTER),
    }


def _numbers(form: str, content: Described, refusal: str) -> Described:
    """Describe a GET of the numbers in a ``form``, which refuses in the media type ``refusal``."""
    described = (
        "The numbers as of the end of the last day that was counted. What is broken down or"
        f" filtered is rounded to the nearest multiple of {ROUNDED_TO}. A number from 1 to"
        f" {FOLD_BELOW - 1}, and a rounded one below {FOLD_BELOW}, is null in JSON, “{FEW}”"
        " elsewhere."
    )
    found = _shown(described, content, refusal)
    wrong = {"description": "A parameter is invalid.", "content": _refused(refusal)}
    return {
        **found,
        "summary": f"Read the numbers ({form})",
        "operationId": f"read_{form}",
        "parameters": [*FILTERS, KNOWN_ALREADY],
        "responses": {**found["responses"], "400": wrong},
    }


def _contents(form: str, media_type: str) -> Described:
    return {
        "summary": f"Read what a heartbeat contains ({form})",
        "operationId": f"read_contents_{form}",
        "parameters": [KNOWN_ALREADY],
        "responses": {
            "200": {
                "description": "The fields, and what happens to them. No token is needed.",
                "content": {media_type: _text()} if form == "page" else {media_type: {}},
            },
            "304": {"description": "The client has this answer already."},
            "500": _error("The collector failed."),
        },
    }


def _badge(form: str, content: Described, refusal: str) -> Described:
    """Describe a GET of the badge in a ``form``, which refuses in the media type ``refusal``."""
    described = (
        "How many installs were active at the end of the last day that was counted. If counting"
        " has stopped, the badge is grey and names that day."
    )
    return {
        **_shown(described, content, refusal),
        "summary": f"Read the badge ({form})",
        "operationId": f"read_badge_{form}",
    }


def _feed() -> Described:
    described = (
        f"At most {MOST_EVENTS} notable events of the last 365 days, the newest first, as an"
        " Atom feed: a release reached a share of the active installs, active installs fell, or"
        " counting stopped."
    )
    return {
        **_shown(described, {ATOM: _text()}, "text/plain"),
        "summary": "Read the feed",
        "operationId": "read_feed",
    }


def _shown(description: str, content: Described, refusal: str) -> Described:
    """Describe a GET of what is shown as of the last day, in any form."""
    return {
        "security": [{}, {"basic": []}, {"bearer": []}],
        "parameters": [KNOWN_ALREADY],
        "responses": {
            "200": {"description": description, "headers": CACHING, "content": content},
            "304": {"description": "The client has this answer already.", "headers": CACHING},
            "401": {
                **_error("The token is missing or wrong."),
                "headers": {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}},
            },
            "429": _error("The client has tried too many wrong tokens.", RETRY_AFTER),
            "500": _error("The collector failed."),
            "503": {
                "description": "The database is not available.",
                "content": _refused(refusal),
            },
        },
    }


def _refused(media_type: str) -> Described:
    return {media_type: _ref("Error") if media_type == JSON_TYPE else _text()}


def _alive() -> Described:
    return {
        "summary": "Ask whether the process runs",
        "description": "It checks nothing else.",
        "operationId": "is_alive",
        "responses": {"200": _state("It runs.", "Alive")},
    }


def _ready() -> Described:
    return {
        "summary": "Ask whether the collector can do its work",
        "description": (
            "Whether its database can be written and has the tables of this release, heartbeats are"
            " stored, and the last finished day is counted, or ended less than an hour ago. The"
            f" answer is at most {EVERY_SECONDS + WITHIN_SECONDS:g} seconds old."
        ),
        "operationId": "is_ready",
        "responses": {
            "200": _state("It can do its work.", "Ready"),
            "503": _state("It cannot, for these reasons.", "NotReady"),
        },
    }


def _state(description: str, schema: str) -> Described:
    content = {JSON_TYPE: _ref(schema)}
    return {"description": description, "headers": NO_STORE, "content": content}


def _error(description: str, headers: Mapping[str, object] | None = None) -> Described:
    described: Described = {"description": description, "content": {JSON_TYPE: _ref("Error")}}
    return {**described, "headers": {**headers}} if headers else described


def _ref(name: str) -> Described:
    return {"schema": _ref_to(name)}


def _ref_to(name: str) -> Described:
    return {"$ref": f"{SCHEMAS}{name}"}


def _text() -> Described:
    return {"schema": {"type": "string"}}
