"""A simulated, realistic fleet: its heartbeats, and when a collector receives each.

For the demo, the tests and the bench. Installs join, leave, stop for a while and return, upgrade
at their own pace or never, and grow. Some clocks are wrong; some retries arrive hours late or
twice. The same seed gives the same fleet.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from itertools import groupby
from typing import NamedTuple, TypeVar
from uuid import UUID

from app.payload import Census, Counts, Edition, Facts, Heartbeat1, bucket, compose
from app.schedule import offset

DUE = time(2, 30, tzinfo=UTC)
SPREAD_SECONDS = 900

# Chances per day.
LEAVES = 0.005
FALLS_SILENT = 0.004
MISSES = 0.03
# Chances per heartbeat.
LATE = 0.04
TWICE = 0.02
AGAIN = 0.005

SILENT_DAYS = (2, 40)
LATE_SECONDS = 23 * 3600
"""A heartbeat is retried until it expires at the next 02:30."""

PACES = {1: 20, 7: 30, 30: 30, 90: 8, 0: 12}
"""Days between an operator's upgrades to the newest release (0: never), with weights."""

SKEWS = {2: 80, 180: 12, 2 * 3600: 5, 3 * 86_400: 2, 3 * 365 * 86_400: 1}
"""The largest error of an install's clock in seconds, with weights."""

DEPLOYMENTS = {
    "docker-compose": 46,
    "kubernetes": 19,
    "unknown": 13,
    "bare-metal": 9,
    "heroku": 6,
    "dokku": 5,
    "nomad": 1,
}
OWN_LABEL = 0.01
"""The share of installs with a rare deployment label."""

PLATFORMS: Mapping[str, int] = {"linux": 68, "darwin": 18, "win32": 11, "freebsd14": 3}
"""Of installs on bare metal or with an unknown deployment; all others are linux."""

PYTHONS = {(3, 11): 18, (3, 12): 46, (3, 13): 28, (3, 14): 8}
POSTGRES = {13: 4, 14: 9, 15: 17, 16: 34, 17: 26, 18: 10}
SITES = {2: 38, 8: 30, 40: 20, 220: 9, 1_500: 3}
"""About how many sites an install begins with, with weights."""


Choice = TypeVar("Choice")


class Arrival(NamedTuple):
    """A heartbeat, and when the collector receives it."""

    received_at: datetime
    heartbeat: Heartbeat1


class Batch(NamedTuple):
    """Heartbeats that a collector receives at one moment."""

    at: datetime
    heartbeats: list[Heartbeat1]


def by_minute(arrivals: Iterable[Arrival]) -> Iterator[Batch]:
    """Yield the arrivals of each minute as one batch, at the time of the last one."""
    for _, group in groupby(arrivals, lambda each: int(each.received_at.timestamp() // 60)):
        together = list(group)
        yield Batch(together[-1].received_at, [each.heartbeat for each in together])


class Release(NamedTuple):
    """A version of ConsentOS, and the fleet's day of its release (0 is the first day)."""

    day: int
    version: str


def releases(days: int) -> list[Release]:
    """Return the releases before a day: a minor one every 24 days, its patch ten days later."""
    found = []
    for minor, day in enumerate(range(-48, days, 24)):
        found += [Release(day, f"0.{minor + 1}.0"), Release(day + 10, f"0.{minor + 1}.1")]
    return [each for each in found if each.day < days]


@dataclass
class _Install:
    """One install on the current day."""

    id: UUID
    joined: int
    offset: timedelta
    """The time from 02:30 until its heartbeat is due."""
    skew: timedelta
    """The difference between its clock and the true time."""
    pace: int
    sites: float
    growth: float
    traffic: float
    facts: Facts
    silent_until: int = 0
    heartbeat: Heartbeat1 | None = None
    """What it sends, except ``sent_at``; None if it must be composed again."""


class Fleet:
    """``installs`` installs that join over ``days`` days; the last day is ``until``.

    It can be iterated once.
    """

    def __init__(self, seed: int, *, installs: int, days: int, until: date) -> None:
        """Decide when each install joins: more of them early than late."""
        self._rng = random.Random(seed)  # noqa: S311 - a reproducible simulation
        self._days = days
        self._first = until - timedelta(days=days - 1)
        self._releases = releases(days)
        self._joining = [0] * days
        for _ in range(installs):
            self._joining[int(days * self._rng.random() ** 1.3)] += 1
        self._present: list[_Install] = []

    def __iter__(self) -> Iterator[tuple[date, list[Arrival]]]:
        """Yield each day with its arrivals, in order."""
        held: list[Arrival] = []
        for number in range(self._days):
            day = self._first + timedelta(days=number)
            ends = datetime.combine(day + timedelta(days=1), time(tzinfo=UTC))
            self._pass_a_night(number)
            sent = [*held, *self._sent(number, datetime.combine(day, DUE))]
            sent.sort(key=lambda arrival: arrival.received_at)
            arrived = [arrival for arrival in sent if arrival.received_at < ends]
            held = sent[len(arrived) :]
            yield day, arrived

    def _pass_a_night(self, number: int) -> None:
        """Let installs leave, stop for a while, and join."""
        chance = self._rng.random
        self._present = [install for install in self._present if chance() >= LEAVES]
        for install in self._present:
            if chance() < FALLS_SILENT:
                install.silent_until = number + self._rng.randint(*SILENT_DAYS)
        self._present += [self._join(number) for _ in range(self._joining[number])]

    def _sent(self, number: int, due: datetime) -> Iterator[Arrival]:
        chance = self._rng.random
        for install in self._present:
            if number < install.silent_until or chance() < MISSES:
                continue
            written = due + install.offset
            received = written + timedelta(seconds=chance() * 3)
            if chance() < LATE:
                received += timedelta(seconds=chance() * LATE_SECONDS)
            heartbeat = self._heartbeat(install, number, written)
            yield Arrival(received, heartbeat)
            if chance() < TWICE:
                yield Arrival(received + timedelta(seconds=chance() * 600), heartbeat)
            if chance() < AGAIN:
                written += timedelta(hours=1 + chance() * 12)
                heartbeat = self._heartbeat(install, number, written)
                yield Arrival(written + timedelta(seconds=chance()), heartbeat)

    def _heartbeat(self, install: _Install, number: int, written: datetime) -> Heartbeat1:
        age = number - install.joined
        if install.pace and age % install.pace == 0:
            self._upgrade(install, number)
        at = written + install.skew
        if install.heartbeat is None or age % 7 == 0:
            install.heartbeat = compose(_grown(install, age), instance_id=install.id, at=at)
            return install.heartbeat
        sent_at = at.isoformat(timespec="seconds")
        return install.heartbeat.model_copy(update={"sent_at": sent_at})

    def _upgrade(self, install: _Install, number: int) -> None:
        newest = self._newest(number)
        if install.facts.version != newest:
            install.facts = replace(install.facts, version=newest)
            install.heartbeat = None

    def _newest(self, number: int) -> str:
        return max(each for each in self._releases if each.day <= number).version

    def _join(self, number: int) -> _Install:
        chance, pick = self._rng.random, self._pick
        pace = pick(PACES)
        sites = pick(SITES) * (0.5 + chance())
        edition: Edition = "ee" if chance() < (0.5 if sites > 30 else 0.06) else "ce"  # noqa: PLR2004 - a weight of the simulation
        skew = timedelta(seconds=pick(SKEWS) * (2 * chance() - 1))
        # Who upgrades rarely has rarely taken the newest to begin with.
        version = self._newest(number - self._rng.randint(0, min(pace or 90, 40)))
        install_id = UUID(int=self._rng.getrandbits(128), version=4)
        return _Install(
            id=install_id,
            joined=number,
            offset=offset(install_id, SPREAD_SECONDS),
            skew=skew,
            pace=pace,
            sites=sites,
            growth=self._rng.choice([0, 0.002, 0.005, 0.02]),
            traffic=self._rng.lognormvariate(3, 1.5),
            facts=self._facts(version, edition, sites),
        )

    def _facts(self, version: str, edition: Edition, sites: float) -> Facts:
        """Return the facts that stay constant while an install grows; the census is empty."""
        chance, pick = self._rng.random, self._pick
        deployment = pick(DEPLOYMENTS)
        if edition == "ee" and chance() < 0.4:  # noqa: PLR2004 - a weight of the simulation
            deployment = "kubernetes"
        python = pick(PYTHONS)
        if chance() < OWN_LABEL:
            deployment = f"lab-{self._rng.randint(1, 400)}"
        return Facts(
            census=_census(0, 0, edition, pick(POSTGRES) * 10_000 + self._rng.randint(0, 9)),
            version=version,
            edition=edition,
            deployment=deployment,
            python=(*python, self._rng.randint(0, 9)),
            platform=pick(PLATFORMS) if deployment in {"bare-metal", "unknown"} else "linux",
            geoip_header_configured=chance() < (0.6 if deployment == "kubernetes" else 0.2),
            geoip_maxmind_configured=chance() < (0.45 if sites > 30 else 0.1),  # noqa: PLR2004 - a weight of the simulation
            rate_limit_enabled=chance() < 0.9,  # noqa: PLR2004 - a weight of the simulation
        )

    def _pick(self, weights: Mapping[Choice, int]) -> Choice:
        return self._rng.choices([*weights], [*weights.values()])[0]


def _grown(install: _Install, age: int) -> Facts:
    sites = install.sites * (1 + install.growth) ** age
    postgres = install.facts.census.server_version_num
    census = _census(sites, install.traffic, install.facts.edition, postgres)
    return replace(install.facts, census=census)


def _census(sites: float, traffic: float, edition: Edition, postgres: int) -> Census:
    """Return the counts of an install with this many sites and ``traffic`` consents per site."""
    # Publishers need TCF: mostly large ones, and those with the enterprise edition.
    of_publishers = 0.6 if edition == "ee" else 0.15
    return Census(
        counts=Counts(
            orgs=bucket(1 + int(sites / 12)),
            sites=bucket(round(sites)),
            users=bucket(1 + int(sites * 0.4)),
            scans_last_24h=bucket(int(sites * 0.6)),
            consents_last_24h=bucket(int(sites * traffic)),
        ),
        tcf_v22_sites=bucket(int(sites * of_publishers)),
        auto_blocking_sites=bucket(int(sites * 0.7)),
        scanner_scheduled_sites=bucket(int(sites * 0.3)),
        server_version_num=postgres,
    )
