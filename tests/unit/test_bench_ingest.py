"""A bench that loses its server says why."""

import os
import sys
from pathlib import Path

import psutil
import pytest

from bench import ingest
from bench.rig import RigError

DIES = "import sys, time; print('no room left'); sys.stdout.flush(); time.sleep(0.2); sys.exit(7)"


def measure(process: psutil.Popen) -> None:
    """Look at a process that has ended, which psutil has no words for but that there is none."""
    process.wait(10)
    psutil.Process(process.pid).cpu_times()


def test_a_process_that_ends_while_it_is_measured_is_reported_with_its_code_and_its_log(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    argv = [sys.executable, "-c", DIES]
    with (
        pytest.raises(RigError, match=r"ended with 7\.(.|\n)*no room left"),
        ingest.running(argv, home=tmp_path, env=os.environ, log=log) as process,
    ):
        measure(process)


def test_a_process_that_ends_unnoticed_is_reported_too(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", DIES]
    log = tmp_path / "log"
    with (
        pytest.raises(RigError, match="no room left"),
        ingest.running(argv, home=tmp_path, env=os.environ, log=log) as process,
    ):
        process.wait(10)


def test_a_failure_of_the_bench_itself_is_raised_as_it_is(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        pytest.raises(RigError, match="not in the database"),
        ingest.running(argv, home=tmp_path, env=os.environ, log=tmp_path / "log"),
    ):
        raise RigError("Heartbeats were acknowledged that are not in the database.")


def test_a_revision_that_git_does_not_have_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ingest.export("no-such-revision") is None
    assert capsys.readouterr().out.count("\n") == 1
