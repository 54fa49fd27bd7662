"""From the tick to the settled row: how long each stage of a heartbeat takes."""

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from bench.rig import DATA, Rig, RigError
from bench.watch import STAGES

HEARTBEATS = 200
BARE = {
    "wake-up": "wake-up",
    "write": "insert",
    "wake-up again": "wake-up",
    "claim": "insert",
    "begin": "insert",
    "POST": "POST",
    "settle": "insert",
}
"""The bare operation that each stage is compared with."""

Say = Callable[[str], None]


def measure(rig: Rig, say: Say) -> dict[str, Any]:
    """Return the milliseconds of each stage, and of the bare operation that it is compared with."""
    install, found = rig.install(), DATA / "latency.json"
    say(f"{HEARTBEATS} heartbeats of made-up days, and the bare operations")
    process = rig.start(f"exec {sys.executable} -m bench.watch {found} {HEARTBEATS}", install.env)
    rig.wait(process, seconds=180)
    if not found.exists():
        raise RigError("The worker of the bench failed; see .data/bench/processes.log.")
    samples: dict[str, dict[str, list[float]]] = json.loads(found.read_text())
    bare = {name: statistics.median(values) for name, values in samples["bare"].items()}
    stages = {
        name: {
            **_spread(samples["stages"][name]),
            "operation": BARE[name],
            "bare": bare[BARE[name]],
        }
        for name in STAGES
    }
    whole = _spread(samples["whole"]["ms"])
    sum_of_bare = sum(bare[BARE[name]] for name in STAGES)
    return {
        "heartbeats": HEARTBEATS,
        "stages": stages,
        "whole": whole | {"bare": sum_of_bare, "ratio": whole["p50"] / sum_of_bare},
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"p50": statistics.median(values), "p99": statistics.quantiles(values, n=100)[98]}


def draw(result: dict[str, Any]) -> Figure:
    """Show each stage next to its bare operation."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(STAGES))
    ours = [result["stages"][name]["p50"] for name in STAGES]
    bare = [result["stages"][name]["bare"] for name in STAGES]
    axes.barh([place - 0.2 for place in places], ours, height=0.4, label="ours, median")
    axes.barh([place + 0.2 for place in places], bare, height=0.4, label="bare, median")
    axes.set_yticks(places, [f"{name} ({BARE[name]})" for name in STAGES])
    axes.set_xlabel("milliseconds")
    axes.invert_yaxis()
    axes.legend()
    return figure
