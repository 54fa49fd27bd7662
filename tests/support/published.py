"""The payload as it is published: ConsentOS's own example of it, ours, and our JSON Schema."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.payload import json_schema

PAGE = Path(__file__).parents[2] / "docs" / "telemetry.md"
EXAMPLE = PAGE.read_text().partition("```json\n")[2].partition("```")[0]
"""The body that our own page shows, of the newest schema."""

# The payload of schema 1 exactly as on ConsentOS's page for its operators.
DOCUMENTED = """\
{
  "telemetry_schema": 1,
  "instance_id": "0a0b3a8a-7e62-4a4e-9b6f-1a4e2d2dfd99",
  "sent_at": "2026-05-02T02:30:00+00:00",
  "version": "0.1.0",
  "edition": "ce",
  "python_version": "3.12.7",
  "platform": "linux",
  "deployment": "docker-compose",
  "counts": {
    "orgs": "1-10",
    "sites": "10-100",
    "users": "1-10",
    "scans_last_24h": "10-100",
    "consents_last_24h": "100-1k"
  },
  "features": {
    "tcf_v22_sites": "1-10",
    "auto_blocking_sites": "10-100",
    "scanner_scheduled_sites": "1-10",
    "geoip_header_configured": true,
    "geoip_maxmind_configured": false,
    "rate_limit_enabled": true,
    "compliance_ee": false
  },
  "stack": {
    "postgres_version": "16.2",
    "redis_present": true
  }
}
"""


def with_value(name: str, value: Any) -> dict[str, Any]:
    """Return the example, as data, with another value in the field ``name``."""
    tree: dict[str, Any] = json.loads(EXAMPLE)
    *sections, last = name.split(".")
    place = tree
    for section in sections:
        place = place[section]
    place[last] = value
    return tree


def conforms(value: Any, schema: Mapping[str, Any] | None = None) -> bool:
    """Check a body against the JSON Schema, without this project's code."""
    match json_schema() if schema is None else schema:
        case {"$ref": reference}:
            return conforms(value, json_schema()["$defs"][reference.rpartition("/")[2]])
        case {"properties": properties, "additionalProperties": False, "required": required}:
            complete = set(value) == set(required) == set(properties)
            return complete and all(conforms(value[name], properties[name]) for name in properties)
        case {"const": one}:
            return value == one and type(value) is type(one)
        case {"enum": several}:
            return value in several
        case {"pattern": pattern, "type": "string"}:
            return isinstance(value, str) and bool(re.fullmatch(pattern, value))
        case {"type": "boolean"}:
            return isinstance(value, bool)
        case open_field:
            raise AssertionError(f"this field of the schema is not closed: {open_field}")
