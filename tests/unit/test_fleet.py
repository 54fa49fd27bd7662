"""The simulated fleet holds what a real one would: whatever its numbers are to be tried on."""

from collections import Counter, defaultdict
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import get_args

import pytest

from app.payload import Bucket
from demo.fleet import DEPLOYMENTS, Arrival, Fleet, releases

UNTIL = date(2026, 5, 31)
DAYS = 60
INSTALLS = 600
BUCKETS = [*get_args(Bucket)]

ByInstall = dict[str, list[Arrival]]


def days_of(seed: int, installs: int = 40, days: int = 20) -> list[tuple[date, list[Arrival]]]:
    return list(Fleet(seed, installs=installs, days=days, until=UNTIL))


@pytest.fixture(scope="module")
def fleet() -> list[tuple[date, list[Arrival]]]:
    return days_of(20260502, INSTALLS, DAYS)


@pytest.fixture(scope="module")
def by_install(fleet: list[tuple[date, list[Arrival]]]) -> ByInstall:
    found: ByInstall = defaultdict(list)
    for _, arrivals in fleet:
        for arrival in arrivals:
            found[arrival.heartbeat.instance_id].append(arrival)
    return found


def minor(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def test_a_seed_makes_the_same_fleet_again_and_another_seed_another() -> None:
    assert days_of(1) == days_of(1)
    assert days_of(1) != days_of(2)


def test_each_day_holds_what_arrives_on_it_in_order(
    fleet: list[tuple[date, list[Arrival]]],
) -> None:
    assert [day for day, _ in fleet] == [
        UNTIL - timedelta(days=DAYS - 1 - number) for number in range(DAYS)
    ]
    for day, arrivals in fleet:
        moments = [arrival.received_at for arrival in arrivals]
        assert moments == sorted(moments)
        assert {moment.astimezone(UTC).date() for moment in moments} <= {day}


def test_the_fleet_is_as_large_as_was_asked_and_grows(
    fleet: list[tuple[date, list[Arrival]]], by_install: ByInstall
) -> None:
    # A few leave or are silent before they have said a word.
    assert 0.95 * INSTALLS <= len(by_install) <= INSTALLS
    sizes = [len({each.heartbeat.instance_id for each in arrivals}) for _, arrivals in fleet]
    assert 0 < sizes[0] < sizes[DAYS // 2] < sizes[-1] < INSTALLS


def test_installs_leave_and_fall_silent_and_miss_days(by_install: ByInstall) -> None:
    gaps: Counter[int] = Counter()
    left = 0
    for arrivals in by_install.values():
        heard = [arrival.received_at.date() for arrival in arrivals]
        gaps.update((later - sooner).days for sooner, later in pairwise(heard))
        left += (UNTIL - heard[-1]).days > 10
    assert 0.02 < gaps[2] / gaps[1] < 0.05
    assert any(gap > 31 for gap in gaps)
    assert 0.05 < left / INSTALLS < 0.25


def test_heartbeats_come_late_and_twice_and_two_on_a_day(by_install: ByInstall) -> None:
    hours: Counter[int] = Counter()
    again = second = 0
    for arrivals in by_install.values():
        names = Counter(arrival.heartbeat.sent_at for arrival in arrivals)
        again += sum(count - 1 for count in names.values())
        second += len(names) - len({sent_at[:10] for sent_at in names})
        hours.update(arrival.received_at.hour for arrival in arrivals)
    total = hours.total()
    assert 0.01 < again / total < 0.03
    assert 0.002 < second / total < 0.01
    assert hours[2] > 0.9 * total
    assert set(hours) == set(range(24))


def test_most_clocks_are_right_and_some_are_years_off(by_install: ByInstall) -> None:
    off = [
        abs(arrival.received_at - datetime.fromisoformat(arrival.heartbeat.sent_at))
        for (arrival, *_) in by_install.values()
    ]
    within = [timedelta(minutes=1), timedelta(hours=1), timedelta(days=1), timedelta(days=4)]
    shares = [sum(each < bound for each in off) / len(off) for bound in within]
    assert shares == sorted(set(shares))
    assert shares[0] > 0.7
    assert 0 < 1 - shares[-1] < 0.03
    assert max(off) > timedelta(days=200)


def test_releases_are_adopted_at_once_and_later_and_never_and_some_are_skipped(
    by_install: ByInstall,
) -> None:
    out = {version: UNTIL - timedelta(days=DAYS - 1 - day) for day, version in releases(DAYS)}
    order = [*out]
    delays: list[int] = []
    skipped = stayed = 0
    for arrivals in by_install.values():
        versions = [arrival.heartbeat.version for arrival in arrivals]
        assert versions == sorted(versions, key=minor)
        assert all(out[each.heartbeat.version] <= each.received_at.date() for each in arrivals)
        for before, after in pairwise(arrivals):
            old, new = before.heartbeat.version, after.heartbeat.version
            if old != new:
                delays.append((after.received_at.date() - out[new]).days)
                skipped += order.index(new) - order.index(old) > 1
        stayed += len(arrivals) > 40 and versions[0] == versions[-1]
    assert 0 in delays
    assert max(delays) > 10
    assert skipped > 20
    assert stayed > 10
    assert len({arrivals[-1].heartbeat.version for arrivals in by_install.values()}) >= 5


def test_installs_grow_and_never_shrink(by_install: ByInstall) -> None:
    grown = 0
    for arrivals in by_install.values():
        for name in ("orgs", "sites", "users", "consents_last_24h"):
            counts = [getattr(arrival.heartbeat.counts, name) for arrival in arrivals]
            places = [BUCKETS.index(count) for count in counts]
            assert places == sorted(places)
            grown += places[0] < places[-1]
    assert grown > 50


def test_the_labels_and_features_go_with_edition_and_size(by_install: ByInstall) -> None:
    last = [arrivals[-1].heartbeat for arrivals in by_install.values()]
    labels = Counter(heartbeat.deployment for heartbeat in last)
    assert labels.most_common(1)[0][0] == "docker-compose"
    assert set(DEPLOYMENTS) < set(labels)
    assert any(label.startswith("lab-") for label in labels)
    assert {heartbeat.platform for heartbeat in last} == {"linux", "darwin", "win32", "other"}
    assert len({heartbeat.python_version.split(".")[1] for heartbeat in last}) == 4
    assert len({heartbeat.stack.postgres_version.split(".")[0] for heartbeat in last}) == 6

    def share(of: str, *, large: bool) -> float:
        chosen = [h for h in last if (BUCKETS.index(h.counts.sites) > 2) == large]
        if of == "ee":
            return sum(h.edition == "ee" for h in chosen) / len(chosen)
        return sum(bool(getattr(h.features, of)) for h in chosen) / len(chosen)

    assert share("ee", large=True) > 2 * share("ee", large=False)
    maxmind = "geoip_maxmind_configured"
    assert share(maxmind, large=True) > 2 * share(maxmind, large=False)
    for heartbeat in last:
        assert heartbeat.features.compliance_ee == (heartbeat.edition == "ee")
