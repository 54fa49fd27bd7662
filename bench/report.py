"""The tables of docs/performance.md, made from the results: ``python -m bench.report``."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"  # noqa: PLR2004 - three digits


def counting(result: dict[str, Any]) -> str:
    """Return both ways to count at each size, in milliseconds and in buffers."""
    head = (
        "consents in the last 24 hours",
        "our write",
        "its statements alone",
        "our count",
        "`count(*)`",
        "`count(*)` ÷ our count",
        "buffers, ours",
        "buffers, `count(*)`",
    )
    rows = [
        _both_ways(f"{size['consents']:,}, {kind}", size[state])
        for size in result["sizes"]
        for state, kind in (("fresh", "never vacuumed"), ("vacuumed", "vacuumed"))
    ]
    scans = result["scans"]
    rows.append(_both_ways(f"…and {scans['scan_jobs']:,} scans of a year", scans["vacuumed"]))
    small, large = result["sizes"][0], result["sizes"][-1]
    times = large["vacuumed"]["write"]["ms"] / small["vacuumed"]["write"]["ms"]
    summary = (
        f"The write at {large['consents']:,} takes {times:.2f} times the write at"
        f" {small['consents']:,}. Once connected it makes {result['round_trips']} round trips,"
        " BEGIN and COMMIT included."
    )
    return f"{_table(head, rows)}\n\n{summary}"


def _both_ways(what: str, ways: dict[str, Any]) -> list[str]:
    write, ours, plain = ways["write"], ways["census"], ways["plain"]
    return [
        what,
        f"{_ms(write['ms'])} ms",
        f"{_ms(write['database_ms'])} ms",
        f"{_ms(ours['ms'])} ms",
        f"{_ms(plain['ms'])} ms",
        f"{plain['ms'] / ours['ms']:,.1f}",
        f"{ours['buffers']:,}",
        f"{plain['buffers']:,}",
    ]


def footprint(result: dict[str, Any]) -> str:
    """Return what each deploy uses, and the ratio to Celery."""
    head = (
        "deploy",
        "processes",
        "PSS, fresh",
        "PSS, after heartbeats",
        "÷ Celery",
        "CPU, an idle minute",
        "÷ Celery",
        "wake-ups",
        "connections to Redis",
        "sessions of Postgres",
        "held for",
    )
    celery = result["Celery worker + beat"]
    rows = [
        (
            name,
            deploy["processes"],
            f"{deploy['fresh_mb']:.0f} MB",
            f"{deploy['after_mb']:.0f} MB",
            f"{deploy['after_mb'] / celery['after_mb']:.2f}",
            f"{deploy['cpu_ms']:.0f} ms",
            f"{deploy['cpu_ms'] / celery['cpu_ms']:.2f}",
            deploy["wake_ups"],
            deploy["redis_connections"],
            deploy["postgres_sessions"],
            f"{deploy['postgres_held_ms']:.0f} ms",
        )
        for name, deploy in result.items()
    ]
    return _table(head, rows)


def latency(result: dict[str, Any]) -> str:
    """Return each stage next to its bare operation."""
    head = ("stage", "p50", "p99", "bare operation", "its p50", "÷ bare")
    rows = [
        (
            name,
            f"{stage['p50']:.1f} ms",
            f"{stage['p99']:.1f} ms",
            stage["operation"],
            f"{stage['bare']:.1f} ms",
            f"{stage['p50'] / stage['bare']:.1f}",
        )
        for name, stage in result["stages"].items()
    ]
    whole = result["whole"]
    total = (
        "**tick to settled row**",
        f"**{whole['p50']:.1f} ms**",
        f"**{whole['p99']:.1f} ms**",
        "the sum",
        f"{whole['bare']:.1f} ms",
        f"**{whole['ratio']:.2f}**",
    )
    return _table(head, [*rows, total])


def startup(result: dict[str, Any]) -> str:
    """Return the time to ready of each process."""
    return _table(("from exec to ready", "median"), ((k, f"{v:.0f} ms") for k, v in result.items()))


def fleet(result: dict[str, Any]) -> str:
    """Return the peaks of each case, and the time to recover."""
    head = (
        f"{result['installs']:,} installs",
        "peak, a second",
        "peak after it is up",
        "requests in all",
        "last accepted, minutes after it is up",
    )
    rows = (
        (
            name,
            f"{case['peak']:,}",
            f"{case['peak_once_up']:,}",
            f"{case['requests']:,}",
            f"{case['last_after_up_s'] / 60:.1f}",
        )
        for name, case in result["cases"].items()
    )
    return _table(head, rows)


def machine(result: dict[str, Any]) -> str:
    """Return the machine and the versions of the measurement."""
    packages = ", ".join(f"{name} {number}" for name, number in result["packages"].items())
    return (
        f"Measured on {result['date']} on {result['cores']} cores of {result['cpu']} with"
        f" {result['memory_gb']} GB of memory, {result['system']}, Python {result['python']},"
        f" Postgres {result['postgres']}, {packages}."
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    each.__name__: each for each in (machine, counting, footprint, latency, startup, fleet)
}


def with_tables(page: str) -> str:
    """Return ``page`` with the results between each pair of markers."""
    for name, table in TABLES.items():
        result = json.loads((RESULTS / f"{name}.json").read_text())
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = page.partition(begin)
        _, also_found, after = rest.partition(end)
        if not (found and also_found):
            raise ValueError(f"{PAGE.name} must hold {begin} and then {end}")
        page = f"{before}{begin}\n{table(result)}\n{end}{after}"
    return page


def main() -> None:
    """Write the tables into the page."""
    PAGE.write_text(with_tables(PAGE.read_text()))


if __name__ == "__main__":
    main()
