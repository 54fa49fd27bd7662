"""``make demo`` ends by itself, leaves nothing running, and survives a predecessor's kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from app.demo.servers import MARKER
from tests.processes import ROOT, minimal


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


def start(directory: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "app.demo"],
        cwd=directory,
        env=minimal({"PYTHONPATH": str(directory), **environment}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.timeout(180)
def test_a_demo_shows_a_heartbeat_even_after_one_that_was_killed(elsewhere: Path) -> None:
    killed = start(elsewhere)
    assert killed.stdout
    for line in killed.stdout:
        if "look two days old" in line:
            break
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    killed.stdout.close()

    # An operator's own settings have no say in it.
    hostile = {"DATABASE_URL": "postgresql://prod.invalid/x", "DO_NOT_TRACK": "1"}
    demo = start(elsewhere, **hostile)
    told, _ = demo.communicate(timeout=120)
    assert demo.returncode == 0, told
    assert '"telemetry_schema": 1' in told
    assert "telemetry.payload {" in told
    assert "row, log line and collector hold the same heartbeat, once" in told
    deadline = time.monotonic() + 10
    while left_running(elsewhere) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left_running(elsewhere) == []
