"""When to try again: the rule, and the header Retry-After of a receiver."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.retry import Delivered, Outcome, Rejected, Result, RetryAt, backoff, judge, result_of
from app.sender import parse_retry_after

NOW = datetime(2026, 5, 2, 2, 30, tzinfo=UTC)
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
NEVER_LONGER = 6 * HOUR

drains = st.integers(0, 10_000)
jitters = st.floats(0, 1, exclude_max=True)
waits = st.timedeltas(timedelta(), 2 * HOUR) | st.timedeltas(timedelta(), timedelta(days=36_500))


def outcome(result: Result, retry_after: timedelta | None = None) -> Outcome:
    return Outcome(result=result, duration_ms=1, retry_after=retry_after)


def next_try(drain: int, jitter: float, asked: timedelta | None = None) -> RetryAt:
    verdict = judge(outcome("retryable", asked), drain, NOW, jitter)
    assert isinstance(verdict, RetryAt)
    return verdict


def test_every_status_is_sent_or_retryable_or_rejected() -> None:
    for status in range(100, 600):
        retryable = status in {408, 425, 429} or 500 <= status <= 599
        expected = "sent" if 200 <= status <= 299 else "retryable" if retryable else "rejected"
        assert result_of(status) == expected, status


@given(drains, jitters, st.none() | waits)
def test_what_was_sent_or_rejected_is_never_tried_again(
    drain: int, jitter: float, asked: timedelta | None
) -> None:
    assert judge(outcome("sent", asked), drain, NOW, jitter) == Delivered()
    assert judge(outcome("rejected", asked), drain, NOW, jitter) == Rejected()


@given(drains, jitters)
def test_a_backoff_is_between_a_minute_and_an_hour(drain: int, jitter: float) -> None:
    assert MINUTE <= backoff(drain, jitter) <= HOUR


@given(drains, drains, jitters)
def test_a_backoff_never_shrinks_with_the_drains(one: int, other: int, jitter: float) -> None:
    assert backoff(min(one, other), jitter) <= backoff(max(one, other), jitter)


def test_a_backoff_doubles_from_one_minute_until_its_cap() -> None:
    minutes = [backoff(drain, 0) / MINUTE for drain in range(1, 10)]
    assert minutes == [1, 2, 4, 8, 16, 32, 48, 48, 48]


@given(drains)
def test_jitter_spreads_a_backoff_by_a_fifth_or_more_also_at_the_cap(drain: int) -> None:
    assert backoff(drain, 0.99) >= 1.2 * backoff(drain, 0)


@given(drains, jitters)
def test_without_a_retry_after_the_next_try_is_one_backoff_away(drain: int, jitter: float) -> None:
    assert next_try(drain, jitter) == RetryAt(NOW + backoff(drain, jitter), None)


@given(drains, jitters, waits)
@example(1, 0.0, NEVER_LONGER)
@example(1, 0.0, NEVER_LONGER + timedelta(seconds=1))
def test_the_next_try_is_never_before_what_was_asked_up_to_six_hours(
    drain: int, jitter: float, asked: timedelta
) -> None:
    verdict = next_try(drain, jitter, asked)
    assert verdict.at >= NOW + min(asked, NEVER_LONGER)
    assert verdict.not_before == (NOW + min(asked, NEVER_LONGER) if asked else None)


@given(drains, jitters, st.none() | waits)
def test_the_next_try_is_never_farther_than_an_hour_or_what_was_asked(
    drain: int, jitter: float, asked: timedelta | None
) -> None:
    farthest = max(HOUR, min(asked or timedelta(), NEVER_LONGER))
    assert next_try(drain, jitter, asked).at <= NOW + farthest


@given(drains, jitters, waits)
@example(1, 0.0, timedelta(seconds=1))
def test_a_retry_after_never_makes_a_try_come_sooner(
    drain: int, jitter: float, asked: timedelta
) -> None:
    assert next_try(drain, jitter, asked).at >= next_try(drain, jitter).at


@given(drains, jitters, st.none() | waits, st.datetimes(timezones=st.just(UTC)))
def test_a_verdict_moves_with_the_time_it_is_asked_at(
    drain: int, jitter: float, asked: timedelta | None, now: datetime
) -> None:
    now = min(now, datetime(9999, 1, 1, tzinfo=UTC))
    verdict = judge(outcome("retryable", asked), drain, now, jitter)
    assert isinstance(verdict, RetryAt)
    assert verdict.at - now == next_try(drain, jitter, asked).at - NOW


@given(st.integers(1, 999_999_999), st.integers(0, 20), st.sampled_from(["", " ", "\t"]))
def test_a_retry_after_in_seconds_is_that_long(seconds: int, zeros: int, space: str) -> None:
    value = f"{space}{'0' * zeros}{seconds}{space}"
    assert parse_retry_after(value, NOW) == timedelta(seconds=seconds)


@given(st.integers(1, 36_500 * 86_400))
def test_a_retry_after_that_is_a_date_lasts_until_then(seconds: int) -> None:
    then = NOW + timedelta(seconds=seconds)
    asked = parse_retry_after(format_datetime(then, usegmt=True), NOW)
    assert asked == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "value",
    [
        "Sat, 02 May 2026 03:30:00 GMT",
        "Saturday, 02-May-26 03:30:00 GMT",
        "Sat May  2 03:30:00 2026",
        "Sat, 02 May 2026 03:30:00 -0000",
        "Sat, 02 May 2026 05:30:00 +0200",
    ],
)
def test_every_form_of_a_date_in_http_is_read(value: str) -> None:
    assert parse_retry_after(value, NOW) == HOUR


@given(st.integers(0, 36_500 * 86_400))
def test_a_date_that_has_passed_asks_for_no_wait(seconds: int) -> None:
    then = NOW - timedelta(seconds=seconds)
    assert parse_retry_after(format_datetime(then, usegmt=True), NOW) is None


@pytest.mark.parametrize("value", [None, "", " ", "0", "000", "0" * 10_000])
def test_no_header_and_no_seconds_ask_for_no_wait(value: str | None) -> None:
    assert parse_retry_after(value, NOW) is None


@pytest.mark.parametrize("value", ["9" * 10, "9" * 10_000, f"{'0' * 5_000}{'9' * 5_000}"])
def test_a_number_without_end_is_a_very_long_wait(value: str) -> None:
    asked = parse_retry_after(value, NOW)
    assert asked is not None
    assert asked > NEVER_LONGER


@pytest.mark.parametrize(
    "value",
    [
        *("-1", "+5", "1.5", "1e3", "0x10", "1_000", "5 s", "5, 6", "soon", "\N{SUPERSCRIPT TWO}"),
        *("\N{ARABIC-INDIC DIGIT TWO}", "Sat, 32 May 2026 03:30:00 GMT", "2026-05-02T03:30:00Z"),
        *("Sat, 02 May 99999999999 03:30:00 GMT", "Sat, 02 May 2026 03:30:00 +99999999", "\0"),
    ],
)
def test_a_header_that_cannot_be_parsed_asks_for_no_wait(value: str) -> None:
    assert parse_retry_after(value, NOW) is None


scraps: Any = st.lists(
    st.sampled_from(
        ["Sat,", "2", "02", "May", "2026", "03:30:00", "3:30", "GMT", "+0200", "-", ",", ":", "."]
    )
    | st.text(max_size=4)
).map(" ".join)


@given(st.text() | scraps | st.from_regex(r"\d+", fullmatch=True))
def test_no_header_raises_and_none_asks_for_a_wait_that_is_not_one(value: str) -> None:
    asked = parse_retry_after(value, NOW)
    assert asked is None or asked > timedelta()
