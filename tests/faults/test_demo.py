"""``make demo`` ends by itself and leaves nothing running; ``make up`` stays until it is killed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from demo.servers import MARKER
from tests.support.processes import ROOT, minimal


def left_running(directory: Path) -> list[psutil.Process]:
    """Return the processes that carry the mark of a demo in ``directory``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == str(directory / ".data" / "demo"):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder to run the demo in, so that no other demo's data is touched."""
    for name in ("Procfile", "Procfile.collector", "app", "workers", "migrations"):
        (tmp_path / name).symlink_to(ROOT / name)
    tmp_path.chmod(0o755)
    return tmp_path


def start(directory: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "demo", *options],
        cwd=directory,
        env=minimal({"PYTHONPATH": str(directory), **environment}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def page_of(demo: subprocess.Popen[str]) -> str:
    """Wait for a demo that stays, and return the address of its collector's page."""
    assert demo.stdout
    lines = []
    for line in demo.stdout:
        lines.append(line)
        if found := re.search(r"the collector's page: +(http\S+)", line):
            return found[1]
    raise AssertionError("".join(lines))


@pytest.mark.timeout(180)
def test_a_demo_shows_a_heartbeat_and_its_page_even_after_one_that_was_killed(
    elsewhere: Path,
) -> None:
    with start(elsewhere, "--stay") as killed:
        try:
            page = page_of(killed)
            assert "html" in httpx.get(page).headers["content-type"]
            shown = httpx.get(f"{page}v1/stats.json").json()
        finally:
            os.kill(killed.pid, signal.SIGKILL)
    assert len(shown["days"]) == 31
    assert shown["days"][-1]["movements"]["active_2d"] > 200
    assert set(shown["days"][-1]["versions"]) > {"0.3.1", "0.4.0"}
    assert shown["live"]["active"] > 200

    # The operator's own settings have no effect on it.
    hostile = {"DATABASE_URL": "postgresql://prod.invalid/x", "DO_NOT_TRACK": "1"}
    demo = start(elsewhere, **hostile)
    output, _ = demo.communicate(timeout=120)
    assert demo.returncode == 0, output
    assert '"telemetry_schema": 1' in output
    assert "telemetry.payload {" in output
    assert "the row, the log and the collector have the same heartbeat, once" in output
    assert re.search(r"is anyone running this\? http://127\.0\.0\.1:\d+/", output)
    assert re.search(r"active in 48 hours: +\d{3} installs now, \d{3} at the end", output)
    assert re.search(r"versions: +0\.4\.0 on \d+, ", output)
    assert "the number of installs active now includes this heartbeat" in output
    deadline = time.monotonic() + 10
    while left_running(elsewhere) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left_running(elsewhere) == []
