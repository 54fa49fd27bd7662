"""A small fleet of installs, counted as the database does, and what is shown of it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from app.collector import stats
from app.collector.adoption import Release
from app.collector.daily import (
    ABSENT,
    ACTIVE_2D,
    ACTIVE_7D,
    ACTIVE_30D,
    DEV_BUILDS,
    IN_USE,
    LOST,
    NEW,
    RETAINED,
    RETAINED_90,
    VALUES,
    Counted,
    Filter,
    Span,
)
from app.collector.names import OTHER
from app.collector.rounding import fold
from app.collector.stats import LiveStats, Numbers, Stats, show

LAST = date(2026, 5, 7)
DAYS = [LAST - timedelta(days=n) for n in range(6)][::-1]
AS_OF = datetime(2026, 5, 8, 0, 1, tzinfo=UTC)
LISTED = ("7.0.0", "7.1.0", "8.0.0-rc.7")
EDITIONS = ("ce", "ee")
RELEASES = [
    Release("7.0.0", DAYS[0] - timedelta(days=30)),
    Release("7.1.0", DAYS[1]),
    Release("8.0.0-rc.7", DAYS[3]),
]


@dataclass(frozen=True)
class Install:
    """An install: how it can be chosen, a value of each kind, and the days of its life."""

    version: str = "7.0.0"
    edition: str = "ce"
    word: str = "docker"
    bucket: str = "0"
    flag: str = "true"
    comes: int = 0
    upgrades: int = 6
    """To the next version."""
    leaves: int = 6

    def runs(self, number: int) -> str:
        """The version on a day."""
        versions = [*LISTED, OTHER]
        later = min(versions.index(self.version) + 1, len(versions) - 1)
        return versions[later] if number >= self.upgrades else self.version

    def value(self, field: str) -> str:
        """Its value of a field, or of its edition."""
        if field == "edition":
            return self.edition
        if stats.UNUSED.get(field) == "false":
            return self.flag
        if field.startswith(("counts.", "features.")):
            return self.bucket
        return {"python_version": "3.12", "stack.postgres_version": "16"}.get(field, self.word)

    def moves(self, number: int) -> Iterator[str]:
        """What it is counted as on a day."""
        if self.comes <= number < self.leaves:
            yield from (ACTIVE_2D, ACTIVE_7D, ACTIVE_30D)
            if self.bucket not in {"0", ABSENT}:
                yield IN_USE
            if number % 2 == self.comes % 2:
                yield RETAINED
                yield RETAINED_90
        if number == self.comes:
            yield NEW
        if number == self.leaves:
            yield LOST
        if number == self.upgrades:
            yield DEV_BUILDS


def count(fleet: list[Install], since: int, until: int, chosen: Filter) -> Numbers:
    """Count as the database does, on the days of these numbers."""

    def present(number: int, chosen: Filter) -> list[Install]:
        return [each for each in passing(number, chosen) if each.comes <= number < each.leaves]

    def passing(number: int, chosen: Filter) -> list[Install]:
        return [
            each
            for each in fleet
            if chosen.version in {None, each.runs(number)}
            and chosen.edition in {None, each.edition}
        ]

    days = range(since, until + 1)
    active, everyone = present(until, chosen), present(until, Filter())
    moves = {
        DAYS[n]: Counter(move for each in passing(n, chosen) for move in each.moves(n))
        for n in days
    }
    return Numbers(
        stocks=moves,
        flows=moves,
        versions={DAYS[n]: Counter(each.runs(n) for each in present(n, chosen)) for n in days},
        values={
            field: Counter(each.value(field) for each in active) for field in ("edition", *VALUES)
        },
        counted={DAYS[n]: Counted(AS_OF) for n in days},
        releases=RELEASES,
        versions_of_all=Counter(each.runs(until) for each in everyone),
        editions_of_all=Counter(each.edition for each in everyone),
    )


def stats_of(
    fleet: list[Install], chosen: Filter | None = None, *, since: int = 0, until: int = 5
) -> Stats:
    """What is shown of a fleet at the end of a day."""
    chosen = chosen or Filter()
    present = sum(each.comes <= until < each.leaves for each in fleet)
    live = LiveStats(AS_OF, fold(present), fold(len(fleet) - present))
    numbers = count(fleet, since, until, chosen)
    span = Span(DAYS[since], DAYS[until], AS_OF)
    return show(stats.nothing(chosen, live=live), numbers, span, days=90)


FLEET = [
    *[Install("7.0.0", "ce", "docker", "1-10", "true")] * 40,
    *[Install("7.1.0", "ce", "docker", "0", "false")] * 30,
    *[Install("7.1.0", "ee", "heroku", "0", "false")] * 20,
    *[Install("8.0.0-rc.7", "ce", "dokku", "0", "false")] * 3,
]
