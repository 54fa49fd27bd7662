"""A client may ask so many times a minute, and no more is remembered of it than that takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.collector.limit import Limiter


def test_a_client_has_a_minutes_requests_at_once_and_then_hears_when_the_next_is_due() -> None:
    limiter = Limiter(60)

    assert [limiter.take("192.0.2.1", 1000.0) for _ in range(62)] == [0] * 60 + [1, 1]
    assert limiter.take("192.0.2.1", 1000.5) == 1
    assert limiter.take("192.0.2.1", 1001.0) == 0
    assert limiter.take("192.0.2.1", 1001.0) == 1


def test_the_seconds_to_wait_are_rounded_up_and_enough() -> None:
    limiter = Limiter(7)  # a token in 8.57 seconds

    assert [limiter.take("192.0.2.1", 0.0) for _ in range(8)] == [0] * 7 + [9]
    assert limiter.take("192.0.2.1", 5.0) == 4
    assert limiter.take("192.0.2.1", 9.0) == 0


@given(st.integers(1, 1000), st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=100))
def test_no_minute_has_more_than_was_saved_and_came_anew(rate: int, gaps: list[float]) -> None:
    limiter, now, taken = Limiter(rate), 1e6, 0
    for gap in gaps:
        now += gap
        for _ in range(rate // 10 + 1):
            taken += not limiter.take("192.0.2.1", now)
    assert taken <= rate + rate * (now - 1e6) / 60 + 1e-3


def test_one_client_does_not_use_up_anothers() -> None:
    limiter = Limiter(1)

    assert limiter.take("192.0.2.1", 0.0) == 0
    assert limiter.take("192.0.2.2", 0.0) == 0
    assert limiter.take("192.0.2.1", 0.0) == 60


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("2001:db8::1", "2001:0DB8:0::0001", True),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("", "", True),
        ("unix:", "", False),
        ("opens\u00e9same", "opens\u00e9same", True),
    ],
)
def test_a_network_of_64_bits_is_one_client(one: str, other: str, same: bool) -> None:  # noqa: FBT001 - pytest's parameter
    limiter = Limiter(1)
    limiter.take(one, 0.0)
    assert bool(limiter.take(other, 0.0)) is same


def test_only_so_many_are_remembered_and_the_first_to_go_asked_longest_ago() -> None:
    limiter = Limiter(1, max_clients=3)

    for last in (1, 2, 3, 1, 4):
        limiter.take(f"192.0.2.{last}", 0.0)
    assert limiter.clients == 3
    assert limiter.take("192.0.2.1", 0.0) == 60
    assert limiter.take("192.0.2.2", 0.0) == 0


def test_whose_bucket_is_full_again_is_forgotten() -> None:
    limiter = Limiter(60)
    for last in range(100):
        limiter.take(f"192.0.2.{last}", 0.0)
    limiter.take("198.51.100.1", 2.0)
    assert limiter.clients == 1


def test_no_address_is_in_its_memory_and_no_other_process_finds_the_same_hash() -> None:
    one, other = Limiter(1), Limiter(1)
    for limiter in (one, other):
        limiter.take("203.0.113.77", 0.0)

    assert b"203.0.113.77" not in repr(vars(one)).encode()
    [mine], [theirs] = one._full_at, other._full_at  # noqa: SLF001 - what it remembers
    assert mine != theirs
    assert len(mine) == 16
