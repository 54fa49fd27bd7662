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
"""Adoption is shown for so many of the newest releases."""
DAYS = 90


class Share(NamedTuple):
    """How many of the active installs, so many days after."""

    after: int
    installs: int
    of: int


@dataclass(frozen=True)
class Adoption:
    """How many of the active installs ran a release or a newer one, by days since it came out."""

    version: str
    released_on: date
    days: list[Share]
    """Those days on which a number is shown."""


class Release(NamedTuple):
    """A version that is listed, and the day on which it came out."""

    version: str
    released_on: date


def of(releases: Sequence[Release], by_day: Mapping[date, Distribution]) -> list[Adoption]:
    """Return the newest of some releases, in their order: those that were seen on any day.

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
