"""Writes the parts of the docs that come from the payload: JSON Schemas and the field table."""  # noqa: INP001 - a script

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from app import payload

DOCS = Path(__file__).parent
PAGE = DOCS / "telemetry.md"
BEGIN, END = "<!-- fields -->", "<!-- /fields -->"

# Few readers can read the patterns of the schema.
_PATTERNS_IN_WORDS = {
    "instance_id": "a UUID",
    "sent_at": "`YYYY-MM-DDThh:mm:ss+00:00`",
    "version": "`N.N.N`, optionally with `-dev`, `-alpha.N`, `-beta.N` or `-rc.N`",
    "python_version": "`N.N.N`",
    "deployment": "1 to 32 of `a-z`, `0-9` and `-`, and no `-` first",
    "stack.postgres_version": "`N.N`",
}


class PublishedError(Exception):
    """The model of a schema has changed after its JSON Schema was published."""

    def __init__(self, version: int) -> None:
        """Say what to do instead."""
        super().__init__(
            f"Schema {version} is published: restore its model in app/payload.py, and"
            f" add schema {payload.SCHEMA_VERSION + 1} after it, as CONTRIBUTING.md says under *Add"
            f" a payload field*. Only if no release has had schema {version} yet, delete"
            f" docs/heartbeat.v{version}.schema.json and run `make docs` again."
        )


def schema(version: int) -> str:
    """Return the text of the file that publishes a schema."""
    return json.dumps(payload.json_schema(payload.SCHEMAS[version]), indent=2) + "\n"


def file_of(version: int, docs: Path = DOCS) -> Path:
    """Return the file that publishes a schema."""
    return docs / f"heartbeat.v{version}.schema.json"


def publish(docs: Path = DOCS) -> None:
    """Write the file of each schema that has none.

    Raises:
        PublishedError: a published file has other content; it is not changed.
    """
    missing = []
    for version in payload.SCHEMAS:
        file = file_of(version, docs)
        if not file.exists():
            missing.append(version)
        elif file.read_text() != schema(version):
            raise PublishedError(version)
    for version in missing:
        file_of(version, docs).write_text(schema(version))


def table() -> str:
    """Return the table of fields: one row each, in the order of the body."""
    forms = dict(_forms(payload.json_schema()))
    rows = [
        f"| `{name}` | {forms[name]} | {field.description} |" for name, field in payload.fields()
    ]
    return "\n".join(["| Field | Form | Purpose |", "| --- | --- | --- |", *rows])


def with_table(page: str) -> str:
    """Return ``page`` with the table between its markers.

    Raises:
        ValueError: the page does not contain each marker once.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or page.count(BEGIN) + page.count(END) != len((BEGIN, END)):
        raise ValueError(f"{PAGE.name} must contain {BEGIN} and then {END}, each once")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _forms(root: Mapping[str, Any], of: str = "", prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, field in (root["$defs"][of] if of else root)["properties"].items():
        name = f"{prefix}{key}"
        if "$ref" in field:
            yield from _forms(root, field["$ref"].rpartition("/")[2], f"{name}.")
        else:
            yield name, _form(name, field)


def _form(name: str, field: Mapping[str, Any]) -> str:
    match field:
        case {"const": value}:
            return _code(value)
        case {"enum": names} if tuple(names) == get_args(payload.Bucket):
            return "bucket"
        case {"enum": values}:
            *first, last = map(_code, values)
            return f"{', '.join(first)} or {last}"
        case {"type": "boolean"}:
            return f"{_code(True)} or {_code(False)}"
        case _:
            return _PATTERNS_IN_WORDS[name]


def _code(value: object) -> str:
    return f"`{json.dumps(value)}`"


def main() -> None:
    """Publish the schemas and write the table; exit with 1 if a published schema has changed."""
    try:
        publish()
    except PublishedError as error:
        sys.exit(str(error))
    PAGE.write_text(with_table(PAGE.read_text()))


if __name__ == "__main__":
    main()
