"""Memory, CPU and connections of the idle processes, compared with Celery with the same job."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from celery import Celery
from matplotlib.figure import Figure
from redis import Redis

from bench.rig import DATA, Install, Rig, family, line, pss_mb, with_driver

HEARTBEATS = 6
MINUTE = 60.0
BOOT_SECONDS = 5.0

_APP = "bench.celery_heartbeat"
_BEAT = f"--schedule {DATA / 'beat'}"

Say = Callable[[str], None]


@dataclass
class Deploy:
    """One way to run it: its processes, and their install."""

    name: str
    install: Install
    pids: list[int]
    heartbeat: Callable[[int], None]
    """Sends the next heartbeat in this deploy's own way."""

    @property
    def processes(self) -> list[psutil.Process]:
        """Every process, children included."""
        return [process for pid in self.pids for process in family(pid)]

    def memory(self) -> float:
        """Return the PSS of all processes, in MB."""
        return sum(pss_mb(process.pid) for process in self.processes)

    def used(self) -> tuple[float, int]:
        """Return the milliseconds of CPU used so far, and how often a thread woke up."""
        nanoseconds = wake_ups = 0
        for process in self.processes:
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                nanoseconds += int((thread / "schedstat").read_text().split()[0])
                status = (thread / "status").read_text()
                wake_ups += int(re.findall(r"\nvoluntary_ctxt_switches:\s+(\d+)", status)[0])
        return nanoseconds / 1e6, wake_ups

    def redis_connections(self) -> int:
        """Return how many connections the processes hold to Redis."""
        with Redis.from_url(self.install.env["REDIS_URL"]) as client:
            port = client.connection_pool.connection_kwargs["port"]
        links = [link for process in self.processes for link in process.net_connections("tcp")]
        return sum(bool(link.raddr) and link.raddr.port == port for link in links)


def measure(rig: Rig, say: Say) -> dict[str, Any]:
    """Measure each deploy alone: side by side they would share pages."""
    result: dict[str, Any] = {}
    for start in (
        partial(_procfile, rig, "worker", "scheduler"),
        partial(_procfile, rig, "solo"),
        partial(_celery, rig, "Celery worker + beat", "worker --concurrency 2", f"beat {_BEAT}"),
        partial(_celery, rig, "Celery, beat inside", f"worker -c 2 --pool threads --beat {_BEAT}"),
    ):
        deploy = start()
        say(f"{deploy.name}: {HEARTBEATS} heartbeats")
        time.sleep(BOOT_SECONDS)
        fresh = {"processes": len(deploy.processes), "fresh_mb": deploy.memory()}
        for number in range(HEARTBEATS):
            deploy.heartbeat(number)
        time.sleep(1)
        say(f"{deploy.name}: an idle minute")
        result[deploy.name] = fresh | {"after_mb": deploy.memory()} | _idle_minute(rig, deploy)
        rig.stop(*deploy.pids)
    return result


def _procfile(rig: Rig, *names: str) -> Deploy:
    install = rig.install()
    pids = [rig.start(line(name), install.env) for name in names]

    def heartbeat(number: int) -> None:
        install.make_it_the_past(number)
        install.wake("heartbeat")
        install.wait_until_sent()

    return Deploy(" + ".join(names), install, pids, heartbeat)


def _celery(rig: Rig, name: str, *commands: str) -> Deploy:
    install = rig.install()
    env = {**install.env, "DATABASE_URL": with_driver(install.url, "asyncpg")}
    pids = [rig.start(f"exec celery --quiet --app {_APP} {command}", env) for command in commands]

    def heartbeat(_: int) -> None:
        install.make_it_the_past(0)
        # Two at once, so that each of two children has done the job.
        with Celery(broker=env["REDIS_URL"]) as tasks:
            for _child in range(2):
                tasks.send_task(f"{_APP}.heartbeat")
        install.wait_until_sent()

    return Deploy(name, install, pids, heartbeat)


def _idle_minute(rig: Rig, deploy: Deploy) -> dict[str, float]:
    ends = time.monotonic() + MINUTE
    cpu_before, woken_before = deploy.used()
    sessions_before, held_before = rig.sessions(deploy.install)
    redis: list[int] = []
    while time.monotonic() < ends:
        redis.append(deploy.redis_connections())
        time.sleep(0.5)
    cpu, woken = deploy.used()
    sessions, held = rig.sessions(deploy.install)
    return {
        "cpu_ms": cpu - cpu_before,
        "wake_ups": woken - woken_before,
        "redis_connections": max(redis),
        "postgres_sessions": sessions - sessions_before,
        "postgres_held_ms": held - held_before,
    }


def draw(result: dict[str, Any]) -> Figure:
    """Show memory and idle CPU of each deploy side by side."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("after_mb", "cpu_ms"),
        ("MB of PSS, after some heartbeats", "ms of CPU in an idle minute"),
        strict=True,
    ):
        bars = axes.barh(list(result), [deploy[key] for deploy in result.values()])
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.set_title(title, fontsize="medium")
        axes.margins(x=0.15)
    figure.axes[0].invert_yaxis()  # all axes share it
    return figure
