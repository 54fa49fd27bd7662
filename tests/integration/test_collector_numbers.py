"""The collector's daily numbers, against plain Python that counts the same heartbeats.

The truth shares nothing with what it judges: no SQL, no table, no name of a field.
"""

import random
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine, NullPool, Row, create_engine, text

from app.collector import daily, names, recount, store
from app.collector.daily import Filter
from app.payload import NEWEST, Heartbeat, parse
from demo.fleet import Batch, Fleet, by_minute
from migrations import migrate
from tests.conftest import Databases, pooled
from tests.support.database import one
from tests.support.published import EXAMPLE

DAY, HOUR, SECOND = timedelta(days=1), timedelta(hours=1), timedelta(seconds=1)
UNTIL = date(2026, 5, 31)


class Cell(NamedTuple):
    """What is counted apart from all else on a day."""

    metric: str
    version: str
    edition: str
    value: str


Truth = Counter[Cell]


RELEASES = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0")
LABELS = ("docker-compose", "kubernetes", "unknown", "bare-metal", "heroku", "dokku", "nomad")


class Ledger:
    """The heartbeats of each install, counted independently of the collector's SQL."""

    def __init__(self, established_days: int = 3) -> None:
        self._established_days = established_days
        self._taken: set[tuple[str, str]] = set()
        self._heard: dict[str, list[tuple[datetime, str, dict[str, Any]]]] = defaultdict(list)

    def take(self, batch: Batch) -> None:
        for heartbeat in batch.heartbeats:
            name = heartbeat.instance_id, heartbeat.sent_at
            if name not in self._taken:
                self._taken.add(name)
                said = (batch.at, heartbeat.sent_at, heartbeat.model_dump())
                self._heard[heartbeat.instance_id].append(said)

    def truth(self, day: date) -> Truth:
        """Return the numbers of a day."""
        found: Truth = Counter()
        for received in self._heard.values():
            before = [each for each in received if each[0] < end(day)]
            heard_on = sorted({each[0].date() for each in before})
            if len(heard_on) < self._established_days:
                continue
            established_on = heard_on[self._established_days - 1]
            last, _, body = max(before, key=lambda each: each[:2])
            named = body["version"] if body["version"] in RELEASES else "other"
            for metric, value in self._counted(day, established_on, last, body):
                found[Cell(metric, named, body["edition"], value)] += 1
        return found

    def _counted(
        self, day: date, established_on: date, last: datetime, body: dict[str, Any]
    ) -> Iterator[tuple[str, str]]:
        active = end(day) - last <= 48 * HOUR
        if body["version"].endswith("-dev"):
            if active:
                yield "dev_builds", ""
            return
        yield from ((name, "") for name in self._moved(day, established_on, last))
        if active:
            yield from self._values(body)
            for days, name in ((30, "retained"), (90, "retained_90")):
                if established_on == day - days * DAY:
                    yield name, ""

    def _moved(self, day: date, established_on: date, last: datetime) -> Iterator[str]:
        silence = end(day) - last
        if established_on == day:
            yield "new"
        if silence > 30 * DAY and (last + 30 * DAY).date() == day:
            yield "lost"
        for name, days in (("active_30d", 30), ("active_7d", 7), ("active_2d", 2)):
            if silence <= days * DAY:
                yield name

    def _values(self, body: dict[str, Any]) -> Iterator[tuple[str, str]]:
        if body["counts"]["consents_last_24h"] != "0":
            yield "in_use", ""
        yield "platform", body["platform"]
        yield "deployment", body["deployment"] if body["deployment"] in LABELS else "other"
        yield "python_version", ".".join(body["python_version"].split(".")[:2])
        yield "stack.postgres_version", body["stack"]["postgres_version"].split(".")[0]
        for section in ("counts", "features"):
            for name, value in body[section].items():
                written = {True: "true", False: "false"}.get(value, value)
                yield f"{section}.{name}", written


def end(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC) + DAY


def moment(written: str) -> datetime:
    return datetime.fromisoformat(f"{written}+00:00")


def heartbeat(install: int = 1, sent_at: str = "2026-03-01T02:30:00", **said: Any) -> Heartbeat:
    example = parse(EXAMPLE)
    names = {"instance_id": str(UUID(int=install)), "sent_at": f"{sent_at}+00:00"}
    return NEWEST.model_validate(example.model_dump() | names | said)


@pytest.fixture
def collector(migrated: str) -> Iterator[Engine]:
    with listing_releases(migrated) as engine:
        yield engine


@contextmanager
def listing_releases(url: str) -> Iterator[Engine]:
    engine = pooled(url)
    with engine.begin() as connection:
        for version in RELEASES:
            connection.execute(text(f"INSERT INTO release VALUES ('{version}', '2026-01-01')"))
    yield engine
    engine.dispose()


def take(collector: Engine, at: str, *heartbeats: Heartbeat, established_days: int = 1) -> None:
    with collector.begin() as connection:
        store.insert(connection, heartbeats, at=moment(at), established_days=established_days)


def count(collector: Engine, now: str) -> None:
    """Count what is due at a time."""
    recount.catch_up(collector, now=moment(now))


def counted(collector: Engine, day: date) -> Truth:
    """Return all that is on record of a day."""
    statement = "SELECT metric, version, edition, value, installs FROM daily WHERE day = :day"
    with collector.begin() as connection:
        rows = connection.execute(text(statement), {"day": day})
        return Counter({Cell(*cell): installs for *cell, installs in rows})


def movements(
    connection: Connection, since: date, until: date, chosen: Filter
) -> dict[date, dict[str, int]]:
    """Return the stocks and the flows of each day, as they are read for the page."""
    found = daily.stocks(connection, since, until, chosen)
    for day, flows in daily.flows(connection, since, until, chosen).items():
        found.setdefault(day, {}).update(flows)
    return found


def moved(collector: Engine, day: str) -> dict[str, int]:
    """Return the movements of a day, as they are read for the page, but for ``in_use``."""
    on = date.fromisoformat(day)
    with collector.begin() as connection:
        found = movements(connection, on, on, Filter()).get(on, {})
    return {name: installs for name, installs in found.items() if name != "in_use"}


def values(collector: Engine, day: str) -> Mapping[str, Mapping[str, int]]:
    with collector.begin() as connection:
        return daily.values(connection, date.fromisoformat(day), Filter())


def measured(collector: Engine) -> list[date]:
    with collector.begin() as connection:
        return [*connection.scalars(text("SELECT day FROM measured ORDER BY 1"))]


def recorded(collector: Engine) -> list[Any]:
    with collector.begin() as connection:
        return [*connection.execute(text("SELECT * FROM daily ORDER BY 1, 2, 3, 4, 5"))]


@pytest.fixture(scope="module")
def days() -> list[tuple[date, list[Batch]]]:
    """The days of a fleet, with what a collector takes on each."""
    fleet = Fleet(20260502, installs=300, days=45, until=UNTIL)
    return [(day, list(by_minute(arrivals))) for day, arrivals in fleet]


@pytest.fixture(scope="module")
def truths(days: Sequence[tuple[date, list[Batch]]]) -> dict[date, Truth]:
    """What is true at the end of each day."""
    ledger = Ledger()
    found = {}
    for day, batches in days:
        for batch in batches:
            ledger.take(batch)
        found[day] = ledger.truth(day)
    return found


@pytest.fixture(scope="module")
def counted_daily(
    databases: Databases,
    collector_template: str,
    days: Sequence[tuple[date, list[Batch]]],
    truths: dict[date, Truth],
) -> Iterator[Engine]:
    """A collector that has taken the fleet's heartbeats, and has counted each day in its time."""
    with databases.copy_of(collector_template) as url, listing_releases(url) as engine:
        for day, batches in days:
            with engine.begin() as connection:
                for batch in batches:
                    store.insert(connection, batch.heartbeats, at=batch.at)
            recount.catch_up(engine, now=end(day) + 61 * SECOND)
            assert counted(engine, day) == truths[day]
        yield engine


def test_every_number_of_every_day_is_what_the_heartbeats_say(
    counted_daily: Engine, truths: dict[date, Truth]
) -> None:
    for day, truth in truths.items():
        assert counted(counted_daily, day) == truth

    # It is worth little where nothing happens.
    metrics = {cell.metric for truth in truths.values() for cell in truth}
    after_90_days = {daily.RETAINED_90}
    assert metrics == {*daily.STOCKS, *daily.FLOWS, *daily.VALUES} - after_90_days
    assert len({cell.version for cell in truths[UNTIL]}) > 3
    assert {cell.edition for cell in truths[UNTIL]} == {"ce", "ee"}


@pytest.mark.parametrize("edition", [None, "ce", "ee"])
@pytest.mark.parametrize("version", [None, "0.4.0", "other", "9.9.9"])
def test_the_numbers_are_read_as_they_are_under_every_filter(
    counted_daily: Engine, truths: dict[date, Truth], version: str | None, edition: str | None
) -> None:
    def chosen(day: date) -> Truth:
        return Counter(
            {
                cell: installs
                for cell, installs in truths[day].items()
                if version in {None, cell.version} and edition in {None, cell.edition}
            }
        )

    def sums(named: Iterable[tuple[str, int]]) -> dict[str, int]:
        found: Counter[str] = Counter()
        for name, installs in named:
            found[name] += installs
        return dict(found)

    since = UNTIL - 20 * DAY
    looked_at = Filter(version, edition)
    with counted_daily.begin() as connection:
        moves = movements(connection, since, UNTIL, looked_at)
        versions = daily.versions(connection, since, UNTIL, looked_at)
        found = dict(daily.values(connection, UNTIL, looked_at))

    for day in (day for day in truths if day >= since):
        cells = chosen(day).items()
        assert moves.get(day, {}) == sums((c.metric, n) for c, n in cells if c.value == "")
        active = [(c.version, n) for c, n in cells if c.metric == "active_2d"]
        assert versions.get(day, {}) == sums(active)
    cells = chosen(UNTIL).items()
    editions = found.pop("edition")
    assert editions == sums((c.edition, n) for c, n in cells if c.metric == "active_2d")
    for field, of_value in found.items():
        assert of_value == sums((c.value, n) for c, n in cells if c.metric == field)


def test_days_that_nobody_counted_are_counted_later_as_they_were(
    collector: Engine, days: Sequence[tuple[date, list[Batch]]], truths: dict[date, Truth]
) -> None:
    with collector.begin() as connection:
        for _, batches in days:
            for batch in batches:
                store.insert(connection, batch.heartbeats, at=batch.at)
    recount.catch_up(collector, now=end(UNTIL) + HOUR)
    for day, truth in truths.items():
        assert counted(collector, day) == truth
    assert one(collector, "SELECT count(*) FROM replay") == 0
    assert one(collector, "SELECT count(*) FROM recount") == 0


def test_days_that_were_missed_after_others_are_counted_later(collector: Engine) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat(1))
    count(collector, "2026-03-02T00:01:00")
    take(collector, "2026-03-02T02:30:00", heartbeat(2, "2026-03-02T02:30:00"))
    count(collector, "2026-03-05T09:00:00")
    assert measured(collector) == [date(2026, 3, day) for day in range(1, 5)]
    assert moved(collector, "2026-03-02")["active_2d"] == 2
    assert moved(collector, "2026-03-03")["active_2d"] == 1


class History:
    """A small fleet in which much happens, taken and counted at times of chance."""

    def __init__(self, seed: int, collector: Engine) -> None:
        self._rng = random.Random(seed)  # noqa: S311 - to be the same again
        self._collector = collector
        self._established_days = self._rng.choice([1, 2, 3])
        self._ledger = Ledger(self._established_days)
        self.truths: dict[date, Truth] = {}

    def go(self, number_of_days: int) -> None:
        day = date(2026, 3, 1)
        for _ in range(number_of_days):
            for at in sorted(self._rng.sample(range(86_400), self._rng.randint(0, 8))):
                self._take(end(day) - DAY + at * SECOND)
                if self._rng.random() < 0.2:
                    self._count(end(day) - DAY + at * SECOND)
            self.truths[day] = self._ledger.truth(day)
            day += DAY * self._rng.choice([1, 1, 1, 1, 2, 9])
            for missing in range((day - max(self.truths)).days - 1):
                silent = max(self.truths) + DAY
                self.truths[silent] = self._ledger.truth(silent)
                assert missing < 8
        self._count(end(max(self.truths)) + HOUR, interrupted=False)

    def _take(self, at: datetime) -> None:
        heartbeats: list[Any] = []
        for _ in range(self._rng.randint(1, 3)):
            sent_at = (at - self._rng.choice([0, 0, 0, 9, 900]) * HOUR).isoformat()[:19]
            heartbeats.append(
                heartbeat(
                    self._rng.randint(1, 9),
                    sent_at,
                    version=self._rng.choice([*RELEASES, "7.7.7", "0.0.0-dev"]),
                    edition=self._rng.choice(["ce", "ee"]),
                    deployment=self._rng.choice([*LABELS, "acme"]),
                )
            )
        batch = Batch(at, heartbeats)
        self._ledger.take(batch)
        with self._collector.begin() as connection:
            days = self._established_days
            store.insert(connection, heartbeats, at=at, established_days=days)

    def _count(self, now: datetime, *, interrupted: bool = True) -> None:
        """Count, and perhaps be stopped, lose what no crash spares, or count again."""
        if self._rng.random() < 0.2:
            with self._collector.begin() as connection:
                recount.request(connection, now.date() - self._rng.randint(0, 20) * DAY)
        while recount.step(self._collector, now=now):
            if interrupted and self._rng.random() < 0.1:
                return
            if self._rng.random() < 0.03:
                with self._collector.begin() as connection:
                    connection.execute(text("TRUNCATE replay"))


@pytest.mark.parametrize("seed", range(12))
def test_whenever_it_counts_and_is_stopped_the_numbers_are_the_same(
    collector: Engine, seed: int
) -> None:
    history = History(seed, collector)
    history.go(14)
    for day, truth in history.truths.items():
        if day >= measured(collector)[0]:
            assert counted(collector, day) == truth, day
        else:
            assert not truth


def test_a_crash_that_empties_what_was_replayed_changes_no_number(collector: Engine) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat(1), heartbeat(2))
    now = moment("2026-03-06T00:01:00")
    while recount.step(collector, now=now) and len(measured(collector)) < 3:
        pass
    with collector.begin() as connection:
        connection.execute(text("TRUNCATE replay"))
    recount.catch_up(collector, now=now)
    assert measured(collector)[-1] == date(2026, 3, 5)
    for day in ("2026-03-04", "2026-03-05"):
        assert moved(collector, day) == {"active_7d": 2, "active_30d": 2}


def test_an_install_counts_once_it_was_heard_of_on_three_days(collector: Engine) -> None:
    for day in ("01", "01", "02", "04"):
        for at in ("02:30:00", "09:00:00"):
            moment_of = f"2026-03-{day}T{at}"
            take(collector, moment_of, heartbeat(1, moment_of), established_days=3)
        if day == "02":
            assert one(collector, "SELECT days_heard FROM install") == 2
            assert one(collector, "SELECT established_on FROM install") is None
    assert one(collector, "SELECT days_heard FROM install") == 3
    assert one(collector, "SELECT established_on FROM install") == date(2026, 3, 4)
    count(collector, "2026-03-05T00:01:00")
    assert moved(collector, "2026-03-03") == {}
    active = dict.fromkeys(("active_2d", "active_7d", "active_30d"), 1)
    assert moved(collector, "2026-03-04") == {**active, "new": 1}


def test_an_install_is_in_no_number_before_it_was_heard_of_on_three_days(
    collector: Engine,
) -> None:
    for day in ("01", "02"):
        sent_at = f"2026-03-{day}T02:30:00"
        take(collector, sent_at, heartbeat(1, sent_at), established_days=3)
    for now in ("2026-03-03T00:01:00", "2026-03-04T00:01:00"):  # as it was replayed, and as it is
        count(collector, now)
        assert recorded(collector) == []
    assert len(measured(collector)) == 3


def test_only_names_on_a_list_are_counted_by(collector: Engine) -> None:
    stranger = {"version": "99999.0.0", "deployment": "consentos-is-spyware"}
    stranger |= {"python_version": "99999.0.0"}
    stack = {"postgres_version": "99999.1", "redis_present": True}
    strangers = [heartbeat(n, **stranger, stack=stack) for n in range(1, 61)]
    take(collector, "2026-03-01T02:30:00", *strangers, heartbeat(99))
    count(collector, "2026-03-02T00:01:00")
    named = values(collector, "2026-03-01")
    assert named["deployment"] == {"docker-compose": 1, "other": 60}
    assert named["python_version"] == {"3.12": 1, "other": 60}
    assert named["stack.postgres_version"] == {"16": 1, "other": 60}
    with collector.begin() as connection:
        day = date(2026, 3, 1)
        versions = daily.versions(connection, day, day, Filter())
        everything = connection.scalar(text("SELECT string_agg(daily::text, ' ') FROM daily"))
    assert versions == {day: {"0.1.0": 1, "other": 60}}
    assert "99999" not in everything
    assert "spyware" not in everything


def test_a_release_that_is_listed_later_is_named_by_a_recount(collector: Engine) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat(version="0.9.0"))
    count(collector, "2026-03-03T00:01:00")
    day = date(2026, 3, 1)
    with collector.begin() as connection:
        assert daily.versions(connection, day, day, Filter()) == {day: {"other": 1}}
        connection.execute(text("INSERT INTO release VALUES ('0.9.0', '2026-03-01')"))
        recount.request(connection, day)
    count(collector, "2026-03-03T00:02:00")
    with collector.begin() as connection:
        assert daily.versions(connection, day, day, Filter()) == {day: {"0.9.0": 1}}


def test_a_recount_that_is_asked_for_before_the_first_count_leaves_no_day_out(
    collector: Engine,
) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat())
    with collector.begin() as connection:
        assert recount.request(connection, date(2026, 3, 3)) == date(2026, 3, 1)
    count(collector, "2026-03-05T00:01:00")
    assert measured(collector) == [date(2026, 3, day) for day in range(1, 5)]


def test_a_poller_learns_how_many_there_are_and_nothing_of_what_they_are_like(
    collector: Engine,
) -> None:
    now = datetime.now(UTC)
    with collector.begin() as connection:
        for at in (now - 2 * DAY, now - DAY):
            said = [heartbeat(n, at.isoformat()[:19]) for n in range(1, 40)]
            store.insert(connection, said, established_days=1, at=at)
    recount.catch_up(collector)
    with collector.begin() as connection:
        last = daily.span(connection)
        assert last
        before, live = daily.values(connection, last.last, Filter()), daily.live(connection).active
        newcomer = heartbeat(99, platform="darwin", edition="ee", version="0.4.0")
        store.insert(connection, [newcomer], established_days=1)
    recount.catch_up(collector)
    with collector.begin() as connection:
        assert daily.span(connection) == last
        assert daily.values(connection, last.last, Filter()) == before
        assert daily.live(connection).active == live + 1


def test_every_field_whose_values_are_text_has_a_list_of_those_that_are_named() -> None:
    missing = names.OPEN.intersection(daily.VALUES) - names.KNOWN.keys()
    assert not missing, f"list in KNOWN of app/collector/names.py which values of {missing} to name"


def test_development_builds_are_counted_apart(collector: Engine) -> None:
    builds = [heartbeat(1, version="0.0.0-dev"), heartbeat(2, version="0.2.0-dev")]
    take(collector, "2026-03-01T02:30:00", *builds, heartbeat(3))
    count(collector, "2026-03-02T00:01:00")
    active = dict.fromkeys(("active_2d", "active_7d", "active_30d", "new"), 1)
    assert moved(collector, "2026-03-01") == {**active, "dev_builds": 2}
    assert values(collector, "2026-03-01")["platform"] == {"linux": 1}


def test_what_is_excluded_is_in_no_number(collector: Engine) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat(1), heartbeat(2))
    with collector.begin() as connection:
        one_of_them = f"WHERE instance_id = '{UUID(int=1)}'"
        connection.execute(text(f"UPDATE install SET excluded = 'made up' {one_of_them}"))
    for now in ("2026-03-03T00:01:00", "2026-03-04T00:01:00"):  # as it was replayed, and as it is
        count(collector, now)
    for day in ("2026-03-01", "2026-03-02", "2026-03-03"):
        assert moved(collector, day)["active_7d"] == 1


def test_the_live_numbers_are_of_this_moment(collector: Engine) -> None:
    now = datetime.now(UTC)
    with collector.begin() as connection:
        store.insert(connection, [heartbeat(n) for n in range(1, 4)])
        store.insert(connection, [heartbeat(4), heartbeat(5)], established_days=1)
        store.insert(connection, [heartbeat(6, version="0.0.0-dev")], established_days=1)
        long_ago = [heartbeat(7), heartbeat(8)]
        store.insert(connection, long_ago, established_days=1, at=now - 49 * HOUR)
        excluded = f"excluded = 'made up' WHERE instance_id = '{UUID(int=5)}'"
        connection.execute(text(f"UPDATE install SET {excluded}"))
    with collector.begin() as connection:
        live = daily.live(connection)
    assert (live.active, live.not_established) == (1, 3)
    assert abs(live.as_of - now) < 60 * SECOND


def test_an_install_that_returns_is_lost_once_and_never_new_again(collector: Engine) -> None:
    take(collector, "2026-03-01T02:31:00", heartbeat())
    count(collector, "2026-04-01T02:35:00")
    take(collector, "2026-04-01T02:40:00", heartbeat(sent_at="2026-04-01T02:40:00"))
    count(collector, "2026-04-02T00:01:00")

    active = dict.fromkeys(("active_2d", "active_7d", "active_30d"), 1)
    assert moved(collector, "2026-03-01") == {**active, "new": 1}
    assert moved(collector, "2026-03-30") == {"active_30d": 1}
    assert moved(collector, "2026-03-31") == {"lost": 1}
    assert moved(collector, "2026-04-01") == active


def test_who_is_still_there_after_thirty_days_is_retained(collector: Engine) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat(1), heartbeat(2))
    take(collector, "2026-03-31T02:30:00", heartbeat(1, "2026-03-31T02:30:00"))
    count(collector, "2026-04-02T00:01:00")
    kept = {day: moved(collector, day).get("retained") for day in ("2026-03-30", "2026-03-31")}
    assert kept == {"2026-03-30": None, "2026-03-31": 1}
    assert "retained" not in moved(collector, "2026-04-01")


def test_who_is_still_there_after_ninety_days_is_retained_then_as_well(collector: Engine) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat(1), heartbeat(2))
    take(collector, "2026-05-30T02:30:00", heartbeat(1, "2026-05-30T02:30:00"))
    count(collector, "2026-06-01T00:01:00")
    days = ("2026-05-29", "2026-05-30", "2026-05-31")
    assert [moved(collector, day).get("retained_90") for day in days] == [None, 1, None]


def test_when_a_day_was_counted_first_stays_known_when_it_is_counted_again(
    collector: Engine,
) -> None:
    day = date(2026, 3, 1)
    take(collector, "2026-03-01T02:30:00", heartbeat(1))
    count(collector, "2026-03-02T00:01:00")
    with collector.begin() as connection:
        first = daily.counted(connection, day, day)[day]
        assert first.at == one(collector, "SELECT as_of FROM measured")
        assert first.flows == daily.FLOWS
        connection.execute(text("UPDATE measured SET as_of = now()"))
        assert daily.counted(connection, day, day)[day].flows == daily.FLOWS[:-1]
        recount.request(connection, day)
    count(collector, "2026-03-02T00:01:00")
    with collector.begin() as connection:
        assert daily.counted(connection, day, day) == {day: first}
    assert one(collector, "SELECT as_of > counted_at FROM measured")


def test_in_use_is_who_has_recorded_a_consent(collector: Engine) -> None:
    counts = parse(EXAMPLE).model_dump()["counts"]
    idle = heartbeat(2, counts={**counts, "consents_last_24h": "0"})
    take(collector, "2026-03-01T02:30:00", heartbeat(1), idle)
    count(collector, "2026-03-02T00:01:00")
    day = date(2026, 3, 1)
    with collector.begin() as connection:
        found = movements(connection, day, day, Filter())[day]
    assert (found["active_2d"], found["in_use"]) == (2, 1)


def test_a_day_begins_with_its_first_second_and_ends_before_the_next(collector: Engine) -> None:
    take(collector, "2026-03-01T23:59:59", heartbeat(1))
    take(collector, "2026-03-02T00:00:00", heartbeat(2))
    count(collector, "2026-04-03T12:00:00")

    def each(metric: str) -> dict[str, int]:
        days = [f"2026-03-{day:02}" for day in (1, 2, 3, 4, 7, 8, 9, 30, 31)] + ["2026-04-01"]
        moves = {day[5:]: moved(collector, day).get(metric, 0) for day in days}
        return {day: installs for day, installs in moves.items() if installs}

    assert each("new") == {"03-01": 1, "03-02": 1}
    assert each("active_2d") == {"03-01": 1, "03-02": 2, "03-03": 1}
    thirty = {"03-09": 2, "03-30": 2, "03-31": 1}
    week = {"03-01": 1, "03-02": 2, "03-03": 2, "03-04": 2, "03-07": 2}
    assert each("active_7d") == {**week, "03-08": 1}
    assert each("active_30d") == {**week, "03-08": 2, **thirty}
    assert each("lost") == {"03-31": 1, "04-01": 1}
    assert values(collector, "2026-03-03")["platform"] == {"linux": 1}


def test_a_day_is_counted_once_it_has_ended_and_all_is_committed(collector: Engine) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat())
    for now in ("2026-03-01T12:00:00", "2026-03-01T23:59:59", "2026-03-02T00:00:59"):
        count(collector, now)
        assert measured(collector) == []
    count(collector, "2026-03-02T00:01:00")
    assert measured(collector) == [date(2026, 3, 1)]


def test_a_field_is_counted_among_the_installs_whose_schema_has_it(collector: Engine) -> None:
    take(collector, "2026-03-01T02:30:00", *[heartbeat(number) for number in range(1, 48)])
    with collector.begin() as connection:
        for table in ("install", "heartbeat"):
            older = f"UPDATE {table} SET body = body #- '{{stack,postgres_version}}' WHERE "
            connection.execute(text(f"{older} instance_id > '{UUID(int=40)}'"))
    count(collector, "2026-03-02T00:01:00")  # as it is
    for _ in range(2):
        found = values(collector, "2026-03-01")
        assert found["stack.postgres_version"] == {"16": 40, daily.ABSENT: 7}
        assert found["platform"] == {"linux": 47}
        with collector.begin() as connection:
            recount.request(connection, date(2026, 3, 1))
        count(collector, "2026-03-02T00:02:00")  # as it was replayed


@pytest.mark.parametrize("year", ["2025", "2027", "0001", "9999"])
def test_the_clock_of_an_install_decides_nothing(collector: Engine, year: str) -> None:
    wrong = heartbeat(1, f"{year}-03-01T02:30:00", version="0.1.0")
    take(collector, "2026-03-01T02:30:00", wrong)
    take(collector, "2026-03-01T05:00:00", heartbeat(1, "2026-03-01T05:00:00", version="0.2.0"))
    take(collector, "2026-03-02T02:30:00", heartbeat(1, "2026-03-02T02:30:00", version="0.3.0"))
    take(collector, "2026-03-02T03:00:00", wrong)  # again, and late: it is known
    count(collector, "2026-03-03T00:01:00")

    assert moved(collector, "2026-03-01")["new"] == 1
    assert "new" not in moved(collector, "2026-03-02")
    first, last = date(2026, 3, 1), date(2026, 3, 2)
    with collector.begin() as connection:
        versions = daily.versions(connection, first, last, Filter())
    assert {day: [*each] for day, each in versions.items()} == {first: ["0.2.0"], last: ["0.3.0"]}


def test_a_clock_that_was_ahead_once_freezes_no_install_and_stops_no_counting(
    collector: Engine,
) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat(1))
    ahead = heartbeat(1, "2026-03-02T02:30:00", version="0.2.0")
    take(collector, "2029-01-01T02:30:00", ahead)  # the database's clock is wrong
    with collector.begin() as connection:
        connection.execute(text("INSERT INTO measured VALUES ('2029-01-01', '2029-01-02')"))
        daily_row = "('2029-01-01', 'active_2d', '0.1.0', 'ce', '', 1)"
        connection.execute(text(f"INSERT INTO daily VALUES {daily_row}"))
    take(collector, "2026-03-03T02:30:00", heartbeat(1, "2026-03-03T02:30:00", version="0.3.0"))
    count(collector, "2026-03-04T00:01:00")

    assert one(collector, "SELECT last_seen FROM install") == moment("2026-03-03T02:30:00")
    assert one(collector, "SELECT body ->> 'version' FROM install") == "0.3.0"
    assert measured(collector)[-1] == date(2026, 3, 3)
    assert moved(collector, "2026-03-03")["active_2d"] == 1
    assert one(collector, "SELECT count(*) FROM daily WHERE day > '2026-03-03'") == 0


def test_two_heartbeats_that_are_committed_in_another_order_than_they_came_are_counted_as_they_came(
    collector: Engine,
) -> None:
    before = heartbeat(1, "2026-03-02T23:59:58", version="0.2.0")
    after = heartbeat(1, "2026-03-03T00:00:01", version="0.3.0")
    take(collector, "2026-03-01T02:30:00", heartbeat(1, version="0.1.0"), established_days=3)
    take(collector, "2026-03-03T00:00:01", after, established_days=3)
    take(collector, "2026-03-02T23:59:58", before, established_days=3)

    assert one(collector, "SELECT days_heard FROM install") == 3
    assert one(collector, "SELECT established_on FROM install") == date(2026, 3, 3)
    assert one(collector, "SELECT last_seen FROM install") == moment("2026-03-03T00:00:01")
    assert one(collector, "SELECT body ->> 'version' FROM install") == "0.3.0"
    assert one(collector, "SELECT former_body ->> 'version' FROM install") == "0.2.0"


def test_a_heartbeat_that_is_committed_late_changes_nothing_about_its_install_on_that_day(
    collector: Engine,
) -> None:
    take(collector, "2026-03-01T02:30:02", heartbeat(1, "2026-03-01T02:30:02", version="0.3.0"))
    before = known(collector)
    take(collector, "2026-03-01T02:30:01", heartbeat(1, "2026-03-01T02:30:01", version="0.2.0"))
    assert known(collector) == before
    assert one(collector, "SELECT count(*) FROM heartbeat") == 2


def known(collector: Engine) -> Row[Any]:
    with collector.begin() as connection:
        return connection.execute(text("SELECT * FROM install")).one()


def test_an_upgrade_from_the_first_tables_has_each_install_as_it_last_reported(
    collector_database: str,
) -> None:
    engine = create_engine(collector_database, poolclass=NullPool)
    with engine.connect() as connection:
        migrate(connection, "collector", "0001")
    # The clock of the second was set back before it sent its last.
    reported = {1: ("07", "08", "09"), 2: ("07", "08", "06")}
    with engine.begin() as connection:
        for install, sent_on in reported.items():
            for on, version, sent in zip(("07", "07", "09"), RELEASES, sent_on, strict=False):
                kept = heartbeat(install, f"2026-03-{sent}T02:30:00", version=version)
                connection.execute(
                    text("INSERT INTO heartbeat VALUES (:id, :sent_at, :at, :body)"),
                    {
                        "id": kept.instance_id,
                        "sent_at": kept.sent_at,
                        "at": moment(f"2026-03-{on}T02:30:00"),
                        "body": kept.canonical(),
                    },
                )
    with engine.connect() as connection:
        migrate(connection, "collector")
    with engine.begin() as connection:
        found = connection.execute(
            text("SELECT body ->> 'version', first_seen, last_seen, days_heard FROM install")
        ).all()
    first, last = moment("2026-03-07T02:30:00"), moment("2026-03-09T02:30:00")
    assert found == [("0.3.0", first, last, 2)] * 2


def test_days_that_a_former_release_counted_keep_their_numbers_and_say_what_they_miss(
    collector_database: str,
) -> None:
    day = date(2026, 3, 1)
    engine = create_engine(collector_database, poolclass=NullPool)
    with engine.connect() as connection:
        migrate(connection, "collector", "0005")
    take(engine, "2026-03-01T02:30:00", heartbeat(1))
    with engine.begin() as connection:
        for counted in (
            "INSERT INTO measured VALUES ('2026-03-01', '2026-03-02 00:01+00')",
            "INSERT INTO daily VALUES ('2026-03-01', 'active_2d', 'other', 'ce', '', 1)",
        ):
            connection.execute(text(counted))
    before = recorded(engine)
    with engine.connect() as connection:
        migrate(connection, "collector")
    assert recorded(engine) == before
    with engine.begin() as connection:
        assert daily.counted(connection, day, day) == {day: daily.Counted(None, has_all=False)}
        recount.request(connection, day)
    count(engine, "2026-03-02T00:01:00")
    with engine.begin() as connection:
        found = daily.counted(connection, day, day)[day]
    assert (found.at, found.flows) == (None, daily.FLOWS)
    assert moved(engine, "2026-03-01")["new"] == 1


def test_whoever_is_forgotten_leaves_the_next_numbers_and_no_number_of_the_past(
    collector: Engine,
) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat(1), heartbeat(2))
    count(collector, "2026-03-02T00:01:00")
    before = moved(collector, "2026-03-01")
    with collector.begin() as connection:
        store.forget(connection, UUID(int=1))
    count(collector, "2026-03-03T00:01:00")

    assert moved(collector, "2026-03-01") == before
    assert before["new"] == 2
    assert moved(collector, "2026-03-02") == {"active_2d": 1, "active_7d": 1, "active_30d": 1}
    # Once its mark is deleted, nothing shows that an id was stored before.
    with collector.begin() as connection:
        connection.execute(text("DELETE FROM forgotten"))
    take(collector, "2026-03-03T02:30:00", heartbeat(1))
    count(collector, "2026-03-04T00:01:00")
    assert moved(collector, "2026-03-03")["new"] == 1


def test_whoever_is_forgotten_leaves_a_replay_that_is_under_way(collector: Engine) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat(1), heartbeat(2))
    replayed = f"SELECT count(*) FROM replay WHERE instance_id = '{UUID(int=1)}'"
    now = moment("2026-03-05T00:01:00")
    while recount.step(collector, now=now) and not one(collector, replayed):
        pass
    with collector.begin() as connection:
        store.forget(connection, UUID(int=1))
    recount.step(collector, now=now)
    assert one(collector, replayed) == 0


def test_what_is_pruned_leaves_every_number_as_it_is_and_cannot_be_counted_again(
    collector: Engine,
) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    with collector.begin() as connection:
        for age in (50, 35, 20, 1):
            # One reports to the last day, one stopped before, and one is lost in between.
            installs = [1, 2, 3][: {50: 3, 35: 2}.get(age, 1)]
            for install in installs:
                at = now - age * DAY
                sent = heartbeat(install, at.isoformat()[:19])
                store.insert(connection, [sent], at=at, established_days=1)
    recount.catch_up(collector)
    before = recorded(collector)
    store.prune(collector, store.cutoff(collector, 40 * DAY))
    assert one(collector, "SELECT count(*) FROM heartbeat") == 4
    assert one(collector, "SELECT count(*) FROM install") == 2
    with collector.begin() as connection:
        since = recount.request(connection, (now - 60 * DAY).date())
    assert since == (now - 35 * DAY).date() + 31 * DAY
    recount.catch_up(collector)
    assert recorded(collector) == before


def test_two_heartbeats_that_are_taken_at_once_count_as_the_later(collector: Engine) -> None:
    later = heartbeat(1, "2026-03-01T09:00:00", edition="ee")
    take(collector, "2026-03-01T09:00:00", later, heartbeat(1), later)
    count(collector, "2026-03-02T00:01:00")
    assert values(collector, "2026-03-01")["edition"] == {"ee": 1}


def test_a_collector_without_heartbeats_counts_nothing(collector: Engine) -> None:
    count(collector, "2026-03-01T12:00:00")
    count(collector, "2026-03-03T12:00:00")
    assert measured(collector) == []
    assert recorded(collector) == []


def test_counting_again_changes_nothing(collector: Engine) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat(1), heartbeat(2, edition="ee"))
    count(collector, "2026-03-02T00:01:30")
    before = recorded(collector), one(collector, "SELECT as_of FROM measured")
    for _ in range(2):
        count(collector, "2026-03-02T00:02:30")
        assert (recorded(collector), one(collector, "SELECT as_of FROM measured")) == before


def test_a_collector_leaves_a_day_to_another_that_is_counting_it(collector: Engine) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat())
    mine = "SELECT pg_advisory_xact_lock(hashtext('consentos-collector counting'))"
    with collector.begin() as other:
        other.execute(text(mine))
        count(collector, "2026-03-02T00:01:00")
        assert measured(collector) == []
    count(collector, "2026-03-02T00:01:00")
    assert measured(collector) == [date(2026, 3, 1)]


def test_many_collectors_that_count_and_take_at_once_count_everyone_once(
    collector: Engine,
) -> None:
    together = threading.Barrier(6)
    now = datetime.now(UTC)

    def run(number: int) -> None:
        together.wait(10)
        for day in range(5):
            at = now - (6 - day) * DAY
            with collector.begin() as connection:
                own = [heartbeat(10 * number + day + 1), heartbeat(999, at.isoformat()[:19])]
                store.insert(connection, own, at=at, established_days=1)
            recount.catch_up(collector)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(run, range(6)))
    with collector.begin() as connection:
        recount.request(connection, now.date() - 7 * DAY)
    recount.catch_up(collector)
    assert one(collector, "SELECT sum(installs) FROM daily WHERE metric = 'new'") == 31
