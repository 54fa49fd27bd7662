"""How fast a release is adopted: its share of the active installs by days since then. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import islice
from typing import NamedTuple

from app.collector.daily import DAY
from app.collector.names import age
from app.collector.rounding import Distribution

RELEASES = 5
"""How many of the newest releases are shown."""
DAYS = 90


class Share(NamedTuple):
    """How many of the active installs ran it, ``after`` days after the release."""

    after: int
    installs: int
    of: int


@dataclass(frozen=True)
class Adoption:
    """How many of the active installs ran a release or a newer one, by days since it came out."""

    version: str
    released_on: date
    days: list[Share]
    """The days on which a number is shown."""


class Release(NamedTuple):
    """A listed version, and the day of its release."""

    version: str
    released_on: date


def of(releases: Sequence[Release], by_day: Mapping[date, Distribution]) -> list[Adoption]:
    """Return the adoption of the newest releases that appeared on any day, in the given order.

    ``by_day`` has the versions of the active installs.
    """
    found = (Adoption(*each, [*_shares(each, by_day)]) for each in releases)
    return [*islice((each for each in found if each.days), RELEASES)]


def _shares(release: Release, by_day: Mapping[date, Distribution]) -> Iterator[Share]:
    for after in range(DAYS + 1):
        versions = by_day.get(release.released_on + after * DAY)
        if versions is None:
            continue
        newer = [each for each in versions.groups if age(each.value) >= age(release.version)]
        if newer:
            yield Share(after, sum(each.installs for each in newer), versions.total)
