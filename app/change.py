"""The difference between two bodies, field by field. Everything here is pure."""

from dataclasses import dataclass
from typing import Any

from app import payload


@dataclass(frozen=True)
class Change:
    """The difference between an earlier and a later body: values by their dotted names."""

    added: dict[str, Any]
    removed: dict[str, Any]
    changed: dict[str, tuple[Any, Any]]


def between(earlier: str | None, later: str) -> Change:
    """Compare two bodies; without an earlier one, every field counts as added."""
    before, after = payload.flat(earlier) if earlier else {}, payload.flat(later)
    return Change(
        added={name: value for name, value in after.items() if name not in before},
        removed={name: value for name, value in before.items() if name not in after},
        changed={
            name: (before[name], value)
            for name, value in after.items()
            if name in before and before[name] != value
        },
    )


def new_fields(earlier: str | None) -> list[str]:
    """Return the fields of today's schema that the earlier body did not have."""
    before = payload.flat(earlier) if earlier else {}
    return [name for name, _ in payload.fields() if name not in before]
