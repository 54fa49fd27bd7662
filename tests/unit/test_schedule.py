"""The heartbeat's day, the install's offset, and the rule that decides a write."""

import ast
from collections import Counter
from datetime import UTC, date, datetime, time, timedelta, timezone
from itertools import product
from pathlib import Path
from uuid import NAMESPACE_OID, UUID, uuid5

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.schedule import CLOCKS_DIFFER, OPENS_AT, Day, believed, obstacle, offset, running_day

ACTORS = Path(__file__).parents[2] / "workers" / "actors.py"
DAY = Day(date(2026, 5, 2))
SECOND = timedelta(seconds=1)
LATE = DAY.closes - SECOND

instants = st.datetimes(timezones=st.just(UTC)).filter(lambda at: 1 < at.year < 9999)
hours = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))


def utc(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}+00:00")


@pytest.mark.parametrize(
    ("now", "day"),
    [
        (utc("2026-05-02 01:00:00"), date(2026, 5, 1)),
        (utc("2026-05-02 02:29:59.999999"), date(2026, 5, 1)),
        (utc("2026-05-02 02:30:00"), date(2026, 5, 2)),
        (utc("2026-05-02 23:59:59"), date(2026, 5, 2)),
        (utc("2028-02-29 02:29:59"), date(2028, 2, 28)),
        (utc("2028-02-29 02:30:00"), date(2028, 2, 29)),
        (utc("2028-03-01 02:29:59"), date(2028, 2, 29)),
        (utc("2027-03-01 02:29:59"), date(2027, 2, 28)),
        (utc("2027-01-01 00:00:00"), date(2026, 12, 31)),
        (utc("2027-01-01 02:30:00"), date(2027, 1, 1)),
    ],
)
def test_the_day_is_the_date_of_the_latest_half_past_two(now: datetime, day: date) -> None:
    assert running_day(now) == Day(day)


@given(instants)
def test_now_is_always_inside_the_running_day(now: datetime) -> None:
    day = running_day(now)
    assert day.opens <= now < day.closes
    assert day.opens.timetz() == day.closes.timetz() == time(2, 30, tzinfo=UTC)
    assert day.closes - day.opens == timedelta(days=1)


@given(instants, hours, st.timezones())
def test_the_day_does_not_depend_on_the_time_zone_of_now(
    now: datetime, fixed: timezone, named: timezone
) -> None:
    assert running_day(now.astimezone(fixed)) == running_day(now)
    assert running_day(now.astimezone(named)) == running_day(now)


@given(st.uuids(), st.integers(1, 3600))
def test_an_offset_is_a_whole_second_inside_the_spread(id_: UUID, spread: int) -> None:
    own = offset(id_, spread)
    assert timedelta() <= own < spread * SECOND
    assert own % SECOND == timedelta()


@given(st.uuids())
def test_without_a_spread_there_is_no_offset(id_: UUID) -> None:
    assert offset(id_, 0) == timedelta()


def test_an_offset_is_the_same_in_every_process_and_version() -> None:
    assert offset(UUID("0a0b3a8a-7e62-4a4e-9b6f-1a4e2d2dfd99"), 900) == timedelta(seconds=453)


def test_a_fleet_is_spread_evenly() -> None:
    fleet = [uuid5(NAMESPACE_OID, str(number)) for number in range(10_000)]
    minutes = Counter(offset(id_, 900) // timedelta(minutes=1) for id_ in fleet)
    assert sorted(minutes) == list(range(15))
    # 667 are expected in each minute, and their standard deviation is 25.
    assert all(567 <= count <= 767 for count in minutes.values())


def test_one_rule_decides_every_write() -> None:
    written = {False: None, True: "written"}
    sent = {
        None: None,
        DAY.opens - SECOND: None,
        DAY.opens: "sent elsewhere",
        DAY.opens + SECOND: "sent elsewhere",
    }
    noticed = {
        None: "not noticed",
        DAY.opens - SECOND: None,
        DAY.opens: "not noticed",
        DAY.opens + SECOND: "not noticed",
    }
    for row, last, notice, waived in product(written, sent, noticed, (False, True)):
        in_the_way = obstacle(
            LATE, written=row, last_telemetry_at=last, noticed_at=notice, waive_notice=waived
        )
        unwaived = None if waived else noticed[notice]
        assert in_the_way == (written[row] or sent[last] or unwaived)


def test_a_notice_is_not_waived_unless_that_is_asked_for() -> None:
    assert obstacle(LATE, written=False, last_telemetry_at=None, noticed_at=None) == "not noticed"


def test_a_time_in_the_future_counts_as_absent_but_for_a_difference_between_two_clocks() -> None:
    near, far = LATE + CLOCKS_DIFFER, LATE + CLOCKS_DIFFER + SECOND
    noticed = DAY.opens - SECOND
    for stamp, expected in {near: "sent elsewhere", far: None}.items():
        found = obstacle(LATE, written=False, last_telemetry_at=stamp, noticed_at=noticed)
        assert found == expected
    for notice in (near, far):
        found = obstacle(LATE, written=False, last_telemetry_at=None, noticed_at=notice)
        assert found == "not noticed"
    assert believed(near, LATE) == near
    assert believed(far, LATE) is None


def test_the_heartbeats_cron_line_is_the_hour_at_which_a_day_opens() -> None:
    # Read and not imported: an import would need a broker, and would leave it to other tests.
    lines = {
        function.name: call.args[0].value
        for function in ast.parse(ACTORS.read_text()).body
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "cron"
        if isinstance(call.args[0], ast.Constant)
    }
    assert lines == {
        "heartbeat": f"{OPENS_AT.minute} {OPENS_AT.hour} * * *",
        "sweep": "* * * * *",
    }
