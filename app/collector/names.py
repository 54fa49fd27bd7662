"""Which values the numbers name: those on a list, because strangers can send any text. Pure.

For a field with a closed set of values, each value is named. For a text field, the values on its
list are named, and all others are counted as ``OTHER``. The list of versions is in the database,
see ``releases``.
"""

from collections.abc import Mapping

from app.payload import all_fields

OTHER = "other"
"""Stands for every value that is not on a list."""

DEVELOPMENT = "-dev"
"""The end of the version of an unreleased build."""

KNOWN: Mapping[str, tuple[str, ...]] = {
    "deployment": (
        *("docker-compose", "kubernetes", "helm", "systemd", "heroku", "dokku", "bare-metal"),
        *("docker", "podman", "swarm", "nomad", "coolify", "fly", "render", "railway", "unknown"),
    ),
    "python_version": tuple(f"3.{minor}" for minor in range(11, 21)),
    "stack.postgres_version": tuple(map(str, range(12, 25))),
}
"""The named values of each text field; Python's version by major and
minor, that of Postgres by major."""

OPEN = frozenset(name for name, field in all_fields().items() if field.annotation is str)
"""The fields whose values are text."""

_STAGES = ("dev", "alpha", "beta", "rc", "")


def age(version: str) -> tuple[int, ...]:
    """Return a sort key for versions: older ones first, a pre-release before its release."""
    release, _, stage = version.partition("-")
    kind, _, n = stage.partition(".")
    return (*map(int, release.split(".")), _STAGES.index(kind), int(n or 0))
