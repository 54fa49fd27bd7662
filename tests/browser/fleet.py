"""A fleet by its numbers: what counting it day by day would leave in a collector's tables.

``daily.count`` defines what each number means. No heartbeat is stored, so 400 days take about a
second. A fleet has the same numbers on whatever day they are written: only the dates move, so that
they end with the last finished day.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from itertools import islice
from math import exp, prod, sqrt
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, NullPool, create_engine, text

from app.collector import daily
from app.collector.daily import ABSENT, VALUES
from app.collector.names import OTHER
from app.payload import Bucket, all_fields
from demo.fleet import DEPLOYMENTS, POSTGRES, PYTHONS
from migrations import migrate

SEED = 7
DAY = timedelta(days=1)
COUNTED_AFTER = timedelta(seconds=90)
"""How long after its end a day is counted."""
SEEN_BEFORE = timedelta(hours=1)
"""How long ago the installs of the live numbers reported."""

CHURN = 0.004
"""The share of the installs that sends its last heartbeat on a day."""
OFF = (0.015, 0.03, 0.06, 0.02, 0.01, 0.01, 0.01)
"""The share of the installs that has been off for two days, at the end of each day of a week. The
week begins six days before the last day, so that the numbers are the same on whatever day."""
IN_USE = 0.78
DEV_BUILDS = 0.02
NOT_ESTABLISHED = 0.03
"""How many installs are not established yet, as a share of the active ones."""
GROWTH = 1.3
"""A fleet grows with this power of its age."""
EE = 0.15
"""The share of the installs that is in the enterprise edition."""
EDITIONS = {"ce": 1 - EE, "ee": EE}

GONE_7D, GONE_30D = 7 - 2, 30 - 2
"""How many days an install is still active within 7 and within 30 days after it was within 2."""

Weights = Mapping[str, float]
"""Values, and how common each of them is."""
Cell = tuple[str, str]
"""A version and an edition."""
Line = tuple[date, str, str, str, str, int]
LINE = ("day", "metric", "version", "edition", "value", "installs")
"""The columns of ``daily``."""
Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A fleet, by what can differ from one scenario to another."""

    installs: int
    """How many are active at the end of the last day."""
    days: int = 400
    """How many days were counted."""
    late: int = 0
    """How many finished days are not counted. If there are any, the collector cannot count them."""
    halves_in: int = 0
    """Over how many days, the last ones, the number of active installs falls by half."""
    versions: Sequence[str] = tuple(
        f"0.{minor}.{patch}" for minor in range(1, 18) for patch in range(2)
    )
    """The releases, the oldest first; that one came out before the first day."""
    every: int = 12
    """The days between two releases. The newest came out half as many days before the last day."""
    paces: Mapping[int, float] = field(default_factory=lambda: {6: 0.55, 35: 0.35, 300: 0.1})
    """The average number of days until an install upgrades, and the share of the installs that
    upgrades at this pace."""
    unlisted: float = 0.03
    """The share of the installs that runs a version which is not listed."""
    values: Mapping[str, Weights] = field(default_factory=dict)
    """The weights of fields that have others than ``USUAL``."""
    values_of_ee: Mapping[str, Weights] = field(default_factory=dict)
    """The same for the installs in the enterprise edition."""
    reported_since: Mapping[str, str] = field(default_factory=dict)
    """The fields that only a version and the newer ones report."""

    def released(self, until: date) -> dict[str, date]:
        """Return when each version came out, where ``until`` is the last day that was counted."""
        newest = until - self.every // 2 * DAY
        count = len(self.versions)
        return {
            version: newest - (count - number) * self.every * DAY
            for number, version in enumerate(self.versions, 1)
        }

    def weights(self, name: str, edition: str) -> Weights:
        """Return how common the values of a field are in an edition."""
        of_ee = self.values_of_ee if edition == "ee" else {}
        return of_ee.get(name) or self.values.get(name) or _usual(name, edition)


SOME: Weights = {"1-10": 0.52, "10-100": 0.33, "100-1k": 0.12, "1k-10k": 0.025, "10k+": 0.005}
"""How large a number is that is not 0."""
USUAL: Mapping[str, Weights] = {
    "platform": {"linux": 0.88, "darwin": 0.07, "win32": 0.04, OTHER: 0.01},
    "deployment": {**DEPLOYMENTS, OTHER: 1},
    "python_version": {f"{major}.{minor}": n for (major, minor), n in PYTHONS.items()},
    "stack.postgres_version": {str(major): n for major, n in POSTGRES.items()},
    "counts.orgs": {"1-10": 0.9, "10-100": 0.09, "100-1k": 0.01},
    "counts.users": {"1-10": 0.6, "10-100": 0.31, "100-1k": 0.08, "1k-10k": 0.01},
    "counts.consents_last_24h": SOME,
}
USED = {
    "features.tcf_v22_sites": 0.35,
    "features.auto_blocking_sites": 0.62,
    "features.scanner_scheduled_sites": 0.48,
    "features.geoip_header_configured": 0.3,
    "features.geoip_maxmind_configured": 0.12,
    "features.rate_limit_enabled": 0.81,
}
"""The share of the installs that use a feature."""


def _usual(name: str, edition: str) -> Weights:
    if name == "features.compliance_ee":
        return {str(edition == "ee").lower(): 1}
    if name in USUAL:
        return USUAL[name]
    used = USED.get(name, 0.9)
    form: object = all_fields()[name].annotation
    if form is bool:
        return {"true": used, "false": 1 - used}
    if form is Bucket:
        return {"0": 1 - used, **{value: used * weight for value, weight in SOME.items()}}
    return {OTHER: 1}


_INSTALLS = text(
    """
    INSERT INTO install (instance_id, first_seen, last_seen, body, days_heard, established_on)
    SELECT CAST(md5(concat(:days_heard, '/', number)) AS uuid), :at, :at, CAST(:body AS jsonb),
        :days_heard, CASE WHEN :days_heard > 2 THEN CAST(:at AS date) END
    FROM generate_series(1, :installs) AS number
    """
)
_REQUESTS = text(
    "INSERT INTO ingest (day, outcome, requests) VALUES (:yesterday, 'accepted', :requests)"
)
_FAIL = text("ALTER TABLE recount ADD CONSTRAINT recount_fails CHECK (false)")
"""From then on no day that is missing can be counted."""


def make(url: str, fleet: Fleet, now: datetime) -> None:
    """Make the tables of a collector in an empty database, and fill them as of ``now``."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        migrate(connection, "collector")
    with engine.begin() as connection:
        fill(connection, fleet, now)


def fill(connection: Connection, fleet: Fleet, now: datetime) -> None:
    """Write what counting a fleet leaves in the tables of a collector, which have no row yet."""
    if not fleet.days:
        return
    rng = random.Random(SEED)  # noqa: S311 - numbers that are the same every time
    until = daily.finished(now) - fleet.late * DAY
    days = [*_days(fleet, until, rng)]
    released = fleet.released(until)
    parts = [_split(each, _weights(fleet, released, each.day)) for each in days]
    _copy(connection, "release", ("version", "released_on"), released.items())
    _copy(connection, "daily", LINE, _lines(fleet, days, parts, rng))
    _measure(connection, days)
    _make_live(connection, fleet, now)
    if fleet.late:
        connection.execute(_FAIL)


class Day(NamedTuple):
    """The numbers of all installs at the end of a day, by the names of the metrics."""

    day: date
    active_2d: int
    active_7d: int
    active_30d: int
    in_use: int
    new: int
    lost: int
    retained: int
    retained_90: int
    dev_builds: int


@dataclass(frozen=True)
class _Course:
    """How a fleet that begins with nobody develops: three numbers for each day.

    The installs that are ``present`` send a heartbeat each day, but for some that are off for two
    days. Those that are ``gone`` since a day never send one again.
    """

    present: Sequence[int]
    new: Sequence[int]
    gone: Sequence[int]

    def active(self, number: int) -> int:
        """Return how many reported within 48 hours before the end of a day."""
        present = self.present[number]
        return max(round(present * (1 - _off(len(self.present) - number))), self.new[number])

    def within(self, number: int, days: int) -> int:
        """Return how many are present, or gone since one of the last days."""
        return self.present[number] + sum(self.gone[max(0, number + 1 - days) : number + 1])

    def kept(self, number: int, after: int) -> tuple[int, float]:
        """Return how many installs were new so long before, and how likely each is active."""
        if number < after:
            return 0, 0.0
        days = range(number + 1 - after, number + 1)
        stayed = prod(1 - self.gone[each] / max(1, self.present[each - 1]) for each in days)
        return self.new[number - after], stayed * (1 - _off(len(self.present) - number))


def _course(fleet: Fleet, rng: random.Random) -> _Course:
    present = [round(_expected(fleet, number)) for number in range(fleet.days)]
    new, gone, before = [], [], 0
    for after in present:
        gone.append(max(_drawn(rng, before, CHURN), before - after))
        new.append(after - before + gone[-1])
        before = after
    return _Course(present, new, gone)


def _expected(fleet: Fleet, number: int) -> float:
    """Return how many installs a fleet has on a day, if it has the right number on the last."""
    left = fleet.days - 1 - number
    grown: float = min(1.0, (number + 1) / (fleet.days - fleet.halves_in)) ** GROWTH
    more = 1 + min(1.0, left / fleet.halves_in) if fleet.halves_in else 1.0
    return fleet.installs / (1 - _off(1)) * grown * more


def _off(days_left: int) -> float:
    """Return the share that is off on a day; one is left on the last."""
    return OFF[-days_left % len(OFF)]


def _drawn(rng: random.Random, installs: int, share: float) -> int:
    """Return how many of so many it may be, each by itself with this chance."""
    deviation = sqrt(installs * share * (1 - share))
    return min(installs, max(0, round(rng.gauss(installs * share, deviation))))


def _days(fleet: Fleet, until: date, rng: random.Random) -> Iterator[Day]:
    course = _course(fleet, rng)
    for number in range(fleet.days):
        active, new = course.active(number), course.new[number]
        retained = min(active - new, _drawn(rng, *course.kept(number, 30)))
        retained_90 = min(active - new - retained, _drawn(rng, *course.kept(number, 90)))
        yield Day(
            day=until - (fleet.days - 1 - number) * DAY,
            active_2d=active,
            active_7d=course.within(number, GONE_7D),
            active_30d=course.within(number, GONE_30D),
            in_use=_drawn(rng, active, IN_USE),
            new=new,
            lost=course.gone[number - GONE_30D] if number >= GONE_30D else 0,
            retained=retained,
            retained_90=retained_90,
            dev_builds=_drawn(rng, active, DEV_BUILDS),
        )


def _weights(fleet: Fleet, released: Mapping[str, date], day: date) -> Mapping[Cell, float]:
    """Return which share of the installs has which version and edition on a day.

    An install runs a version or a newer one, the likelier the longer that has been out.
    """
    reached = [_reached(fleet, (day - out).days) for out in released.values()]
    shares = {
        version: (1 - fleet.unlisted) * (this - following)
        for version, this, following in zip(
            released, [1.0, *reached[1:]], [*reached[1:], 0.0], strict=True
        )
    }
    return {
        (version, edition): share * of_edition
        for version, share in {**shares, OTHER: fleet.unlisted}.items()
        for edition, of_edition in EDITIONS.items()
    }


def _reached(fleet: Fleet, days: int) -> float:
    """Return the share of the installs that has upgraded so many days after a release."""
    return 1 - sum(share * exp(-max(0, days) / pace) for pace, share in fleet.paces.items())


def _split(numbers: Day, weights: Mapping[Cell, float]) -> dict[str, Counter[Cell]]:
    """Return each metric of a day by version and edition."""
    active = _apportion(numbers.active_2d, weights)
    week = active + _apportion(numbers.active_7d - numbers.active_2d, weights)
    month = week + _apportion(numbers.active_30d - numbers.active_7d, weights)
    new = _apportion(numbers.new, active)
    retained = _apportion(numbers.retained, active - new)
    return {
        daily.ACTIVE_2D: active,
        daily.ACTIVE_7D: week,
        daily.ACTIVE_30D: month,
        daily.IN_USE: _apportion(numbers.in_use, active),
        daily.NEW: new,
        daily.LOST: _apportion(numbers.lost, weights),
        daily.RETAINED: retained,
        daily.RETAINED_90: _apportion(numbers.retained_90, active - new - retained),
        daily.DEV_BUILDS: Counter({(OTHER, "ce"): numbers.dev_builds}),
    }


def _apportion(total: int, weights: Mapping[Key, float]) -> Counter[Key]:
    """Return whole numbers that add up to ``total``, as near to the weights as they can be.

    Where the weights are whole numbers, and ``total`` is no more than all of them, each number is
    no more than its weight.
    """
    whole = sum(weights.values())
    if not whole:
        return Counter()
    exact = {key: total * weight / whole for key, weight in weights.items()}
    found = Counter({key: int(number) for key, number in exact.items()})
    missing = total - found.total()
    for key in sorted(exact, key=lambda key: found[key] - exact[key])[:missing]:
        found[key] += 1
    return found


def _lines(
    fleet: Fleet,
    days: Sequence[Day],
    parts: Sequence[Mapping[str, Counter[Cell]]],
    rng: random.Random,
) -> Iterator[Line]:
    """Yield the rows of all days: values for the last one only, as no other day's are read."""
    for each, part in zip(days, parts, strict=True):
        for metric, cells in part.items():
            for (version, edition), installs in (+cells).items():
                yield each.day, metric, version, edition, "", installs
    for name in VALUES:
        for (version, edition), values in _values(fleet, name, parts[-1], rng).items():
            for value, installs in (+values).items():
                yield days[-1].day, name, version, edition, value, installs


def _values(
    fleet: Fleet, name: str, part: Mapping[str, Counter[Cell]], rng: random.Random
) -> dict[Cell, Counter[str]]:
    """Return how many active installs of a version and an edition have which value of a field."""
    since = fleet.versions.index(fleet.reported_since.get(name, fleet.versions[0]))
    silent = {*fleet.versions[:since], *([OTHER] if since else [])}
    active, in_use = part[daily.ACTIVE_2D], part[daily.IN_USE]
    found = {cell: Counter({ABSENT: n}) for cell, n in active.items() if cell[0] in silent}
    shown = {cell: n for cell, n in active.items() if cell[0] not in silent}
    if name == "counts.consents_last_24h":  # its zeros are those that are not in use
        found = {cell: Counter({"0": active[cell] - in_use[cell]}) for cell in active}
        shown = in_use
    for edition in EDITIONS:
        cells = {cell: n for cell, n in shown.items() if cell[1] == edition}
        shares = _apportion(sum(cells.values()), fleet.weights(name, edition))
        pool = [*shares.elements()]
        rng.shuffle(pool)
        taken = iter(pool)
        for cell, installs in cells.items():
            found.setdefault(cell, Counter()).update(islice(taken, installs))
    return found


def _measure(connection: Connection, days: Sequence[Day]) -> None:
    """Have each day be counted once, shortly after its end."""
    columns = ["day", "as_of", "counted_at", "retention_as_of"]
    moments = ((each.day, daily.begins(each.day + DAY) + COUNTED_AFTER) for each in days)
    _copy(connection, "measured", columns, ((day, at, at, at) for day, at in moments))


def _copy(
    connection: Connection, table: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]
) -> None:
    driver: Any = connection.connection.driver_connection
    statement = f"COPY {table} ({', '.join(columns)}) FROM STDIN"
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row(tuple(row))


def _make_live(connection: Connection, fleet: Fleet, now: datetime) -> None:
    """Make the installs that are counted at the moment, and the requests of yesterday."""
    body = json.dumps({"version": fleet.versions[-1], "edition": "ce"})
    not_established = round(fleet.installs * NOT_ESTABLISHED)
    for days_heard, installs in ((3, fleet.installs), (1, not_established)):
        at = now - SEEN_BEFORE
        values = {"at": at, "body": body, "days_heard": days_heard, "installs": installs}
        connection.execute(_INSTALLS, values)
    requests = fleet.installs + not_established
    yesterday = now.date() - DAY
    connection.execute(_REQUESTS, {"yesterday": yesterday, "requests": requests})
