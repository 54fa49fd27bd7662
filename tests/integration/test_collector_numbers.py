"""The collector's daily numbers, against plain Python that counts the same heartbeats.

The truth shares nothing with what it judges: no SQL, no table, no name of a field.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine, NullPool, create_engine, text

from app.collector import daily, store
from app.collector.daily import Filter
from app.demo.fleet import Batch, Fleet, by_minute
from app.payload import Heartbeat1
from migrations import migrate
from tests.conftest import Databases
from tests.database import one
from tests.unit.published import EXAMPLE

DAY, HOUR, SECOND = timedelta(days=1), timedelta(hours=1), timedelta(seconds=1)
UNTIL = date(2026, 5, 31)


class Cell(NamedTuple):
    """What is counted apart from all else on a day."""

    metric: str
    version: str
    edition: str
    value: str


Truth = Counter[Cell]


class Ledger:
    """What was heard of each install, as somebody would note it down by hand."""

    def __init__(self) -> None:
        self._taken: set[tuple[str, str]] = set()
        self._heard: dict[str, list[tuple[datetime, str, dict[str, Any]]]] = defaultdict(list)

    def take(self, batch: Batch) -> None:
        for heartbeat in batch.heartbeats:
            name = heartbeat.instance_id, heartbeat.sent_at
            if name not in self._taken:
                self._taken.add(name)
                said = (batch.at, heartbeat.sent_at, heartbeat.model_dump())
                self._heard[heartbeat.instance_id].append(said)

    def truth(self, day: date, as_of: datetime) -> Truth:
        """Return what is to be told of a day at a moment, which is its end or before that."""
        found: Truth = Counter()
        for told in self._heard.values():
            before = [each for each in told if each[0] < as_of]
            if before:
                last, _, body = max(before, key=lambda each: each[:2])
                for metric, value in self._counted(day, as_of, before[0][0], last, body):
                    found[Cell(metric, body["version"], body["edition"], value)] += 1
        return found

    def _counted(
        self, day: date, as_of: datetime, first: datetime, last: datetime, body: dict[str, Any]
    ) -> Iterator[tuple[str, str]]:
        silence = as_of - last
        if first.date() == day:
            yield "new", ""
        if silence > 30 * DAY and (last + 30 * DAY).date() == day:
            yield "lost", ""
        if silence <= 30 * DAY:
            yield "active_30d", ""
        if silence <= 7 * DAY:
            yield "active_7d", ""
        if silence <= 48 * HOUR:
            yield "active_2d", ""
            yield "platform", body["platform"]
            yield "deployment", body["deployment"]
            yield "python_version", ".".join(body["python_version"].split(".")[:2])
            yield "stack.postgres_version", body["stack"]["postgres_version"].split(".")[0]
            for section in ("counts", "features"):
                for name, value in body[section].items():
                    told = {True: "true", False: "false"}.get(value, value)
                    yield f"{section}.{name}", told


def end(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC) + DAY


def moment(told: str) -> datetime:
    return datetime.fromisoformat(f"{told}+00:00")


def heartbeat(install: int = 1, sent_at: str = "2026-03-01T02:30:00", **said: Any) -> Heartbeat1:
    example = Heartbeat1.model_validate_json(EXAMPLE)
    names = {"instance_id": str(UUID(int=install)), "sent_at": f"{sent_at}+00:00"}
    return Heartbeat1.model_validate(example.model_dump() | names | said)


@pytest.fixture
def collector(collector_database: str) -> Engine:
    return migrated(collector_database)


def migrated(url: str) -> Engine:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        migrate(connection, "collector")
    return engine


def take(collector: Engine, at: str, *heartbeats: Heartbeat1) -> None:
    with collector.begin() as connection:
        store.insert(connection, heartbeats, at=moment(at))


def measure(collector: Engine, now: str) -> None:
    with collector.begin() as connection:
        daily.measure(connection, now=moment(now))


def counted(connection: Connection, day: date) -> Truth:
    """Return all that is on record of a day."""
    rows = connection.execute(
        text("SELECT metric, version, edition, value, installs FROM daily WHERE day = :day"),
        {"day": day},
    )
    return Counter({Cell(*cell): installs for *cell, installs in rows})


def moved(collector: Engine, day: str) -> dict[str, int]:
    """Return the movements of a day, as they are read for the page."""
    on = date.fromisoformat(day)
    with collector.begin() as connection:
        return daily.movements(connection, on, on, Filter()).get(on, {})


def recorded(collector: Engine) -> list[Any]:
    with collector.begin() as connection:
        rows = connection.execute(text("SELECT * FROM daily ORDER BY 1, 2, 3, 4, 5"))
        return [*rows, *connection.execute(text("SELECT * FROM measured ORDER BY 1"))]


@pytest.fixture(scope="module")
def days() -> list[tuple[date, list[Batch]]]:
    """The days of a fleet, with what a collector takes on each."""
    fleet = Fleet(20260502, installs=400, days=45, until=UNTIL)
    return [(day, list(by_minute(arrivals))) for day, arrivals in fleet]


@pytest.fixture(scope="module")
def truths(days: Sequence[tuple[date, list[Batch]]]) -> dict[date, Truth]:
    """What is true at the end of each day."""
    ledger = Ledger()
    found = {}
    for day, batches in days:
        for batch in batches:
            ledger.take(batch)
        found[day] = ledger.truth(day, end(day))
    return found


@pytest.fixture(scope="module")
def told(
    databases: Databases, days: Sequence[tuple[date, list[Batch]]], truths: dict[date, Truth]
) -> Iterator[Engine]:
    """A collector that has taken the fleet's heartbeats, and has counted each day in its time.

    It has counted the days to noon as well.
    """
    ledger = Ledger()
    with databases.copy_of("template1") as url:
        engine = migrated(url)
        for day, batches in days:
            noon = end(day) - 12 * HOUR
            with engine.begin() as connection:
                for batch in batches:
                    if batch.at < noon:
                        store.insert(connection, batch.heartbeats, at=batch.at)
                        ledger.take(batch)
                daily.measure(connection, now=noon)
                if day.day % 5 == 0:
                    assert counted(connection, day) == ledger.truth(day, noon)
                for batch in batches:
                    if batch.at >= noon:
                        store.insert(connection, batch.heartbeats, at=batch.at)
                        ledger.take(batch)
                daily.measure(connection, now=end(day) + 20 * SECOND)
                assert counted(connection, day) == truths[day]
        yield engine


def test_every_number_of_every_day_is_what_the_heartbeats_say(
    told: Engine, truths: dict[date, Truth]
) -> None:
    with told.begin() as connection:
        for day, truth in truths.items():
            assert counted(connection, day) == truth

    # It is worth little where nothing happens.
    for metric in daily.MOVEMENTS:
        assert sum(n for truth in truths.values() for cell, n in truth.items() if cell[0] == metric)
    metrics = {cell.metric for truth in truths.values() for cell in truth}
    assert metrics == {*daily.MOVEMENTS, *daily.VALUES}
    assert len({cell.version for cell in truths[UNTIL]}) > 3
    assert {cell.edition for cell in truths[UNTIL]} == {"ce", "ee"}


@pytest.mark.parametrize("edition", [None, "ce", "ee"])
@pytest.mark.parametrize("version", [None, "0.4.0", "0.3.1", "9.9.9"])
def test_the_numbers_are_read_as_they_are_under_every_filter(
    told: Engine, truths: dict[date, Truth], version: str | None, edition: str | None
) -> None:
    def side(cell: Cell) -> int:
        of_version = version in (None, cell.version)
        of_edition = edition in (None, cell.edition)
        return 2 * (not of_version) + (not of_edition)

    def spread(cells: Iterable[tuple[str, Cell, int]]) -> dict[str, tuple[int, ...]]:
        found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        for name, cell, installs in cells:
            found[name][side(cell)] += installs
        return {name: tuple(installs) for name, installs in found.items()}

    since = UNTIL - 20 * DAY
    chosen = Filter(version, edition)
    with told.begin() as connection:
        movements = daily.movements(connection, since, UNTIL, chosen)
        versions = daily.versions(connection, since, UNTIL, chosen)
        values = daily.values(connection, UNTIL, chosen)

    assert set(versions) == {day for day in truths if day >= since}
    for day, of_version in versions.items():
        moves: Counter[str] = Counter()
        for cell, installs in truths[day].items():
            if side(cell) == 0 and cell.value == "":
                moves[cell.metric] += installs
        assert movements.get(day, {}) == moves
        active = [(c.version, c, n) for c, n in truths[day].items() if c.metric == "active_2d"]
        assert of_version == spread(active)
    now = truths[UNTIL].items()
    assert values.pop("edition") == spread((c[2], c, n) for c, n in now if c[0] == "active_2d")
    for field, of_value in values.items():
        assert of_value == spread((c.value, c, n) for c, n in now if c.metric == field)


def test_days_that_nobody_counted_are_counted_later_as_they_were(
    collector: Engine, days: Sequence[tuple[date, list[Batch]]], truths: dict[date, Truth]
) -> None:
    with collector.begin() as connection:
        for _, batches in days:
            for batch in batches:
                store.insert(connection, batch.heartbeats, at=batch.at)
        daily.measure(connection, now=end(UNTIL))
        for day, truth in truths.items():
            assert counted(connection, day) == truth


def test_an_install_that_returns_is_lost_once_and_never_new_again(collector: Engine) -> None:
    take(collector, "2026-03-01T02:31:00", heartbeat())
    measure(collector, "2026-04-01T02:35:00")
    take(collector, "2026-04-01T02:40:00", heartbeat(sent_at="2026-04-01T02:40:00"))
    measure(collector, "2026-04-02T00:00:00")

    active = dict.fromkeys(("active_2d", "active_7d", "active_30d"), 1)
    assert moved(collector, "2026-03-01") == {**active, "new": 1}
    assert moved(collector, "2026-03-30") == {"active_30d": 1}
    assert moved(collector, "2026-03-31") == {"lost": 1}
    assert moved(collector, "2026-04-01") == active


def test_an_install_is_lost_at_the_hour_of_its_silence_and_on_that_day_only(
    collector: Engine,
) -> None:
    take(collector, "2026-03-01T18:00:00", heartbeat())
    for now, lost in (
        ("2026-03-31T17:59:59", {"active_30d": 1}),
        ("2026-03-31T18:00:00", {"active_30d": 1}),
        ("2026-03-31T18:00:01", {"lost": 1}),
    ):
        measure(collector, now)
        assert moved(collector, "2026-03-31") == lost
    measure(collector, "2026-04-01T12:00:00")
    assert moved(collector, "2026-03-31") == {"lost": 1}
    assert moved(collector, "2026-04-01") == {}


def test_a_day_begins_with_its_first_second_and_ends_before_the_next(collector: Engine) -> None:
    take(collector, "2026-03-01T23:59:59", heartbeat(1))
    take(collector, "2026-03-02T00:00:00", heartbeat(2))
    measure(collector, "2026-04-02T12:00:00")

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
    with collector.begin() as connection:
        values = daily.values(connection, date(2026, 3, 3), Filter())
    assert values["platform"] == {"linux": (1, 0, 0, 0)}


@pytest.mark.parametrize("year", ["2025", "2027", "0001", "9999"])
def test_the_clock_of_an_install_decides_nothing(collector: Engine, year: str) -> None:
    wrong = heartbeat(1, f"{year}-03-01T02:30:00", version="1.0.0")
    take(collector, "2026-03-01T02:30:00", wrong)
    take(collector, "2026-03-01T05:00:00", heartbeat(1, "2026-03-01T05:00:00", version="1.0.1"))
    take(collector, "2026-03-02T02:30:00", heartbeat(1, "2026-03-02T02:30:00", version="1.0.2"))
    take(collector, "2026-03-02T03:00:00", wrong)  # again, and late: it is known
    measure(collector, "2026-03-03T00:00:00")

    assert moved(collector, "2026-03-01")["new"] == 1
    assert "new" not in moved(collector, "2026-03-02")
    first, last = date(2026, 3, 1), date(2026, 3, 2)
    with collector.begin() as connection:
        versions = daily.versions(connection, first, last, Filter())
    assert {day: [*each] for day, each in versions.items()} == {first: ["1.0.1"], last: ["1.0.2"]}


@pytest.mark.parametrize("counts_first", [True, False])
def test_days_on_which_the_collector_was_down_are_counted_when_it_is_back(
    collector: Engine, *, counts_first: bool
) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat(1), heartbeat(2))
    measure(collector, "2026-03-01T12:00:00")
    take(collector, "2026-03-01T13:00:00", heartbeat(3))
    if counts_first:
        measure(collector, "2026-03-05T09:00:00")
    newer = heartbeat(1, "2026-03-05T09:00:10", version="2.0.0")
    take(collector, "2026-03-05T09:00:10", newer, heartbeat(4))
    measure(collector, "2026-03-05T09:01:00")

    everyone = {"active_7d": 3, "active_30d": 3}
    assert moved(collector, "2026-03-01") == {"active_2d": 3, "new": 3, **everyone}
    assert moved(collector, "2026-03-02") == {"active_2d": 3, **everyone}
    assert moved(collector, "2026-03-03") == everyone
    assert moved(collector, "2026-03-04") == everyone
    today = {"active_2d": 2, "new": 1, "active_7d": 4, "active_30d": 4}
    assert moved(collector, "2026-03-05") == today
    with collector.begin() as connection:
        first, last = date(2026, 3, 1), date(2026, 3, 5)
        versions = daily.versions(connection, first, last, Filter())
        spread = {day: sorted(each) for day, each in versions.items()}
        assert spread == {
            first: ["0.1.0"],
            first + DAY: ["0.1.0"],
            last: ["0.1.0", "2.0.0"],
        }


def test_a_heartbeat_that_is_written_across_midnight_is_counted_on_its_day(
    collector: Engine,
) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat(1))
    measure(collector, "2026-03-01T23:59:30")
    with collector.begin() as slow:
        store.insert(slow, [heartbeat(2)], at=moment("2026-03-01T23:59:58"))
        measure(collector, "2026-03-02T00:00:01")
        assert moved(collector, "2026-03-01")["new"] == 1
    measure(collector, "2026-03-02T00:01:01")

    assert moved(collector, "2026-03-01")["new"] == 2
    assert "new" not in moved(collector, "2026-03-02")


def test_whoever_is_forgotten_leaves_the_next_numbers_and_no_number_of_the_past(
    collector: Engine,
) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat(1), heartbeat(2))
    measure(collector, "2026-03-02T02:00:00")
    before = moved(collector, "2026-03-01")
    with collector.begin() as connection:
        store.forget(connection, UUID(int=1))
    measure(collector, "2026-03-02T02:01:00")

    assert moved(collector, "2026-03-01") == before
    assert before["new"] == 2
    assert moved(collector, "2026-03-02") == {"active_2d": 1, "active_7d": 1, "active_30d": 1}
    # Once its mark has gone, nothing tells that an id was there before.
    with collector.begin() as connection:
        connection.execute(text("DELETE FROM forgotten"))
    take(collector, "2026-03-02T02:30:00", heartbeat(1))
    measure(collector, "2026-03-02T02:31:00")
    assert moved(collector, "2026-03-02")["new"] == 1


def test_pruning_leaves_every_number_as_it_is(collector: Engine) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    with collector.begin() as connection:
        for age in (50, 35, 20, 1):
            # One is heard of to the last, one left, and one is lost meanwhile.
            installs = [1, 2, 3][: {50: 3, 35: 2}.get(age, 1)]
            for install in installs:
                sent_at = (now - age * DAY).isoformat().removesuffix("+00:00")
                store.insert(connection, [heartbeat(install, sent_at)], at=now - age * DAY)
        daily.measure(connection, now=now)
    before = recorded(collector)
    with collector.begin() as connection:
        store.prune(connection, 40 * DAY)
    assert one(collector, "SELECT count(*) FROM heartbeat") == 4
    assert one(collector, "SELECT count(*) FROM install") == 2
    with collector.begin() as connection:
        daily.measure(connection, now=now)
    assert recorded(collector) == before


def test_what_is_rare_beyond_fifty_is_kept_as_one(collector: Engine) -> None:
    # Two of each, but for the last three.
    numbers = [number for number in range(53) for _ in range(2 if number < 50 else 1)]
    versions = [
        heartbeat(install, version=f"1.0.{number}") for install, number in enumerate(numbers)
    ]
    labels = [
        heartbeat(1_000 + install, version="1.0.0", deployment=f"lab-{number}")
        for install, number in enumerate(numbers)
    ]
    take(collector, "2026-03-01T02:30:00", *versions, *labels)
    measure(collector, "2026-03-01T12:00:00")

    day = date(2026, 3, 1)
    with collector.begin() as connection:
        of_version = daily.versions(connection, day, day, Filter())[day]
        of_label = daily.values(connection, day, Filter())["deployment"]
        rare = daily.movements(connection, day, day, Filter(version="*"))[day]
    assert len(of_version) == 51
    assert of_version["*"][0] == 3
    assert of_version["1.0.0"][0] == 2 + len(labels)
    assert len(of_label) == 51
    assert of_label["docker-compose"][0] == len(versions)
    # The labels' fiftieth place is taken by that of all the others.
    assert of_label["*"][0] == 3 + 2
    assert rare == {"active_2d": 3, "active_7d": 3, "active_30d": 3, "new": 3}


def test_two_heartbeats_that_are_taken_at_once_count_as_the_later(collector: Engine) -> None:
    later = heartbeat(1, "2026-03-01T09:00:00", edition="ee")
    take(collector, "2026-03-01T09:00:00", later, heartbeat(1), later)
    measure(collector, "2026-03-01T12:00:00")
    before = recorded(collector)
    take(collector, "2026-03-02T02:30:00", heartbeat(1, "2026-03-02T02:30:00"))
    measure(collector, "2026-03-01T12:00:00")

    assert recorded(collector) == before
    day = date(2026, 3, 1)
    with collector.begin() as connection:
        assert daily.values(connection, day, Filter())["edition"] == {"ee": (1, 0, 0, 0)}


def test_a_collector_that_nobody_has_told_anything_counts_nothing(collector: Engine) -> None:
    measure(collector, "2026-03-01T12:00:00")
    measure(collector, "2026-03-03T12:00:00")
    days = [date(2026, 3, 1), date(2026, 3, 2), date(2026, 3, 3)]
    with collector.begin() as connection:
        assert [*connection.scalars(text("SELECT day FROM measured ORDER BY 1"))] == days
    assert one(collector, "SELECT count(*) FROM daily") == 0


def test_counting_again_changes_nothing(collector: Engine) -> None:
    take(collector, "2026-03-01T02:30:00", heartbeat(1), heartbeat(2, edition="ee"))
    measure(collector, "2026-03-02T00:00:30")
    before = recorded(collector)
    for _ in range(2):
        measure(collector, "2026-03-02T00:00:30")
        assert recorded(collector) == before


def test_two_collectors_that_count_at_once_take_turns(collector: Engine) -> None:
    take(collector, datetime.now(UTC).isoformat().removesuffix("+00:00"), heartbeat())
    waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"

    def count() -> None:
        with collector.begin() as connection:
            daily.measure(connection)

    with ThreadPoolExecutor(1) as pool:
        with collector.begin() as first:
            daily.measure(first)
            second = pool.submit(count)
            deadline = time.monotonic() + 10
            while not one(collector, waits):
                assert time.monotonic() < deadline
            turn = datetime.now(UTC)
        second.result(10)

    assert one(collector, "SELECT max(as_of) FROM measured") > turn
    assert one(collector, "SELECT max(installs) FROM daily") == 1


def test_many_collectors_that_count_and_take_at_once_count_everyone_once(
    collector: Engine,
) -> None:
    together = threading.Barrier(6)

    def run(number: int) -> None:
        together.wait(10)
        for round_ in range(5):
            with collector.begin() as connection:
                store.insert(connection, [heartbeat(10 * number + round_), heartbeat(999)])
            with collector.begin() as connection:
                daily.measure(connection)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(run, range(6)))
    with collector.begin() as connection:
        daily.measure(connection)
    assert one(collector, "SELECT sum(installs) FROM daily WHERE metric = 'new'") == 31
