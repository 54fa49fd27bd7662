"""From exec to ready: each process, compared with a bare interpreter with the same imports."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from bench.rig import ROOT, Rig, line

RUNS = 5

READY = {"worker": "ready for action", "scheduler": "actor=sweep", "solo": "actor=sweep"}
"""What each process logs when it is ready."""

IMPORTS = "import dramatiq.cli, periodiq, pydantic_settings, redis"
"""The libraries that all three import before they are ready; the first actor imports the rest."""

FIRST_ACTOR = "import httpx, psycopg, sqlalchemy.dialects.postgresql, tenacity"

Say = Callable[[str], None]


def measure(rig: Rig, say: Say) -> dict[str, Any]:
    """Return the median milliseconds to ready of each process, and of the bare interpreters."""
    env = rig.install().env
    result: dict[str, Any] = {}
    for name, word in READY.items():
        say(f"starting {name} {RUNS} times")
        result[name] = statistics.median(_to_ready(line(name), word, env) for _ in range(RUNS))
    for name, imports in (
        ("bare interpreter", "pass"),
        ("with the same imports", IMPORTS),
        ("with those of the first actor too", f"{IMPORTS}; {FIRST_ACTOR}"),
    ):
        say(f"starting Python {RUNS} times: {name}")
        command = f'exec {sys.executable} -c "{imports}; print(1, flush=True)"'
        result[name] = statistics.median(_to_ready(command, "1", env) for _ in range(RUNS))
    return result


def _to_ready(command: str, word: str, env: Mapping[str, str]) -> float:
    """Return the milliseconds from the start of a command to a line with a word in it."""
    started = time.perf_counter()
    with subprocess.Popen(  # noqa: S602 - as every Procfile runner does
        command,
        shell=True,
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout  # noqa: S101 - asked for above
        for said in process.stdout:
            if word in said:
                break
        took = 1000 * (time.perf_counter() - started)
        process.terminate()
        process.stdout.read()
    return took


def draw(result: dict[str, Any]) -> Figure:
    """Show the times as bars."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(result), list(result.values()))
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlabel("milliseconds from exec to ready")
    axes.margins(x=0.1)
    axes.invert_yaxis()
    return figure
