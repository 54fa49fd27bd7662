"""``make bench``: measure what the telemetry costs, write the results, and draw charts."""

import json
import os
import platform
import re
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import psutil
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.status import Status
from sqlalchemy import text

from bench import counting, fleet, footprint, latency, report, startup
from bench.rig import Rig, RigError, rig, rounded
from demo import servers

Say = Callable[[str], None]

MEASUREMENTS: dict[str, tuple[Callable[[Rig, Say], dict[str, Any]], Callable[[Any], Figure]]] = {
    "fleet": (lambda _, say: fleet.measure(say), fleet.draw),
    "startup": (startup.measure, startup.draw),
    "latency": (latency.measure, latency.draw),
    "footprint": (footprint.measure, footprint.draw),
    "counting": (counting.measure, counting.draw),
}

console = Console(highlight=False, soft_wrap=True)


def machine(rig: Rig) -> dict[str, Any]:
    """Return what the figures were measured on."""
    cpu = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    with rig.install(migrated=False).engine.begin() as connection:
        postgres = connection.execute(text("SHOW server_version")).scalar_one()
    names = ("SQLAlchemy", "psycopg", "httpx", "dramatiq", "periodiq", "redis", "celery")
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": platform.system(),
        "python": platform.python_version(),
        "postgres": postgres.split()[0],
        "packages": {name: version(name) for name in names},
    }


def save(name: str, result: dict[str, Any], figure: Figure | None = None) -> None:
    """Write a result, and its picture."""
    mpl.rcParams["svg.hashsalt"] = "consentos-telemetry"
    report.RESULTS.mkdir(exist_ok=True)
    content = json.dumps(rounded(result, 2), indent=1)
    # A list of numbers on one line.
    content = re.sub(r"\[[\d,\s]+\]", lambda found: " ".join(found[0].split()), content)
    (report.RESULTS / f"{name}.json").write_text(f"{content}\n")
    if figure:
        figure.savefig(report.RESULTS / f"{name}.svg", metadata={"Date": None})


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(help=f"{', '.join(MEASUREMENTS)}; default: all."),
    ] = None,
) -> None:
    """Measure what the telemetry costs its host, on embedded servers.

    Without names it measures everything, writes results and charts to bench/results, and updates
    the tables of docs/performance.md. Exit code 1 if a measurement failed, 2 for an unknown name.
    """
    chosen = names or list(MEASUREMENTS)
    if unknown := [name for name in chosen if name not in MEASUREMENTS]:
        console.print(f"Unknown: {', '.join(unknown)}. Available: {', '.join(MEASUREMENTS)}.")
        raise typer.Exit(2)
    if not Path("/proc/self/smaps_rollup").exists():
        console.print("The bench runs only on Linux, because it reads /proc.")
        raise typer.Exit(1)
    started = time.monotonic()
    try:
        results = {name: _measured(name) for name in chosen}
    except (RigError, servers.ServersError) as error:
        console.print(f"[red]✗[/] {error}")
        raise typer.Exit(1) from None
    if not names:
        with rig() as stand:
            save("machine", machine(stand))
        for name, result in results.items():
            save(name, result, MEASUREMENTS[name][1](result))
        report.main()
        console.print("The results are in bench/results, and in docs/performance.md.")
    console.print(f"Done in {time.monotonic() - started:.0f} s.")


def _measured(name: str) -> dict[str, Any]:
    """Measure one thing, and print its table."""
    began = time.monotonic()
    # New servers for each measurement, so that none affects the next one.
    with console.status(name) as status, rig() as stand:
        result = MEASUREMENTS[name][0](stand, partial(_say, status, name))
    console.print(f"[green]✓[/] {name} ({time.monotonic() - began:.0f} s)")
    console.print(report.TABLES[name](rounded(result, 2)))
    return result


def _say(status: Status, name: str, doing: str) -> None:
    if console.is_terminal:
        status.update(f"{name}: {doing}")
    else:
        console.print(f"  {name}: {doing}")


if __name__ == "__main__":
    typer.run(bench)
