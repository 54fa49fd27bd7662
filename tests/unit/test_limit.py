"""A client may ask so often and bring so many installs, and no more is remembered of it."""

from collections import Counter
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.collector.limit import DAY_SECONDS, Busiest, DailyInstalls, Limiter

DAY = 20_000 * DAY_SECONDS


def test_a_client_may_use_a_minutes_requests_at_once_and_then_gets_the_wait_for_the_next() -> None:
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
def test_no_time_allows_more_than_the_saved_tokens_and_the_new_ones(
    rate: int, gaps: list[float]
) -> None:
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


def test_to_ask_how_long_to_wait_takes_nothing() -> None:
    limiter = Limiter(1)

    assert [limiter.wait("192.0.2.1", 0.0) for _ in range(3)] == [0] * 3
    assert limiter.clients == 0
    limiter.take("192.0.2.1", 0.0)
    assert [limiter.wait("192.0.2.1", 30.0) for _ in range(3)] == [30] * 3
    assert limiter.wait("192.0.2.1", 60.0) == 0


# Installs a day


def test_a_client_may_send_for_so_many_installs_a_day_and_then_gets_the_wait() -> None:
    daily = DailyInstalls(3)
    noon = DAY + DAY_SECONDS / 2

    assert [daily.admit("192.0.2.1", UUID(int=n), noon) for n in range(4)] == [0, 0, 0, 43_200]
    assert daily.admit("192.0.2.1", UUID(int=9), noon + 0.5) == 43_200
    assert daily.admit("192.0.2.1", UUID(int=9), DAY + DAY_SECONDS - 0.01) == 1
    assert daily.admit("192.0.2.1", UUID(int=9), DAY + DAY_SECONDS) == 0


def test_an_install_that_a_client_has_brought_it_may_bring_again() -> None:
    daily = DailyInstalls(2)
    for n in (1, 2, 3):
        daily.admit("192.0.2.1", UUID(int=n), DAY)

    assert [bool(daily.admit("192.0.2.1", UUID(int=n), DAY)) for n in (1, 2, 3, 2)] == [
        False,
        False,
        True,
        False,
    ]


def test_one_client_does_not_use_up_anothers_installs() -> None:
    daily = DailyInstalls(1)

    assert daily.admit("192.0.2.1", UUID(int=1), DAY) == 0
    assert daily.admit("192.0.2.2", UUID(int=2), DAY) == 0
    assert daily.admit("192.0.2.2", UUID(int=1), DAY) > 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8:0:ffff::1", True),
        ("2001:db8::1", "2001:db8:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
    ],
)
def test_a_network_of_48_bits_brings_installs_as_one_client(
    one: str,
    other: str,
    same: bool,  # noqa: FBT001 - pytest's parameter
) -> None:
    daily = DailyInstalls(1)
    daily.admit(one, UUID(int=1), DAY)
    assert bool(daily.admit(other, UUID(int=2), DAY)) is same


def test_only_so_many_ids_are_remembered_and_the_first_to_go_came_longest_ago() -> None:
    daily = DailyInstalls(2, max_ids=4)
    for last, n in ((1, 1), (1, 2), (2, 3), (1, 1), (3, 4), (4, 5)):
        assert daily.admit(f"192.0.2.{last}", UUID(int=n), DAY) == 0

    assert daily.remembered == 4
    assert daily.admit("192.0.2.1", UUID(int=6), DAY) > 0
    assert daily.admit("192.0.2.2", UUID(int=6), DAY) == 0


def test_one_client_is_remembered_whole_whatever_it_may_bring() -> None:
    daily = DailyInstalls(10, max_ids=3)
    admitted = [daily.admit("192.0.2.1", UUID(int=n), DAY) == 0 for n in range(20)]
    assert sum(admitted) == daily.remembered == 10


def test_the_next_day_remembers_nothing_of_the_one_before() -> None:
    daily = DailyInstalls(50)
    for n in range(50):
        daily.admit(f"192.0.2.{n}", UUID(int=n), DAY)
    daily.admit("192.0.2.1", UUID(int=1), DAY + DAY_SECONDS)
    assert daily.remembered == 1


def test_no_address_and_no_id_is_in_its_memory() -> None:
    daily = DailyInstalls(1)
    instance_id = UUID("7d1f0f3c-7e62-4a4e-9b6f-1a4e2d2dfd99")
    daily.admit("203.0.113.77", instance_id, DAY)

    memory = repr(vars(daily))
    for trace in (b"203.0.113.77", b"\xcb\x00qM", instance_id.bytes, str(instance_id).encode()):
        assert repr(trace)[2:-1] not in memory


# The busiest client


def most(busiest: Busiest, addresses: list[str], now: float = DAY) -> int:
    """Return by how much the number of the busiest client grows."""
    return sum(busiest.count(address, now) for address in addresses)


def test_the_requests_of_the_busiest_client_are_counted_and_of_no_other() -> None:
    busiest = Busiest()
    assert most(busiest, ["192.0.2.1"] * 5 + ["192.0.2.2"] * 3) == 4
    assert most(busiest, ["192.0.2.2"] * 2) == 0
    assert most(busiest, ["192.0.2.2"]) == 1


def test_a_new_day_begins_at_zero_and_takes_nothing_back() -> None:
    busiest = Busiest()
    assert most(busiest, ["192.0.2.1"] * 5) == 4
    assert most(busiest, ["192.0.2.1"] * 2, DAY + DAY_SECONDS) == 1
    assert busiest.clients == 1


@given(st.lists(st.integers(0, 9), max_size=200), st.integers(1, 12))
def test_however_few_are_remembered_the_number_is_never_too_large_and_hardly_too_small(
    lasts: list[int], clients: int
) -> None:
    busiest = Busiest(clients=clients)
    found = most(busiest, [f"192.0.2.{last}" for last in lasts])
    truth = max(Counter(lasts).values(), default=0)
    assert truth - len(lasts) / (clients + 1) - 1 <= found <= max(truth - 1, 0)
    assert busiest.clients <= clients


def test_clients_that_come_once_a_day_count_for_nothing_however_often_a_process_starts() -> None:
    assert sum(most(Busiest(), [f"192.0.2.{last}"]) for last in range(50)) == 0


def test_a_proxy_is_the_busiest_among_thousands_that_come_once() -> None:
    busiest = Busiest()
    flood = [f"10.0.{n // 250}.{n % 250}" if n % 2 else "192.0.2.1" for n in range(20_000)]
    assert 9_800 <= most(busiest, flood) <= 10_000


def test_no_address_is_in_the_memory_of_the_busiest() -> None:
    busiest = Busiest()
    busiest.count("203.0.113.77", DAY)
    memory = repr(vars(busiest))
    for trace in (b"203.0.113.77", b"\xcb\x00qM"):
        assert repr(trace)[2:-1] not in memory
