"""What a body has that an earlier one had not, field by field. Pure."""

from dataclasses import dataclass
from typing import Any

from app import payload


@dataclass(frozen=True)
class Change:
    """From the last body that was sent to the one that would be: values by their dotted names."""

    added: dict[str, Any]
    removed: dict[str, Any]
    changed: dict[str, tuple[Any, Any]]


def between(earlier: str | None, later: str) -> Change:
    """Compare two bodies; where there is no earlier one, all is added."""
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
