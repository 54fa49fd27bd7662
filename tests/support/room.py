"""Where the tests keep the files of their servers."""

import os
import shutil
from hashlib import sha256
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
MEMORY_BYTES = 4 * 2**30
"""Memory that is free when the servers' files are kept in it. They take less than 2 GiB."""


def room(project: Path = ROOT) -> Path:
    """Return the directory for the files of servers: in memory, if enough is free.

    Hundreds of databases are made and dropped. On a disk, the tests take a fifth longer. The next
    run, or ``make clean``, deletes what a killed run has left. A project that is in memory itself
    has these files in its own directory.
    """
    directory, memory = project / ".data", Path("/dev/shm")  # noqa: S108 - the owner is checked below
    if memory.is_dir() and not project.is_relative_to(memory):
        free = min(shutil.disk_usage(memory).free, psutil.virtual_memory().available)
        if free > MEMORY_BYTES:
            directory = memory / f"consentos-telemetry-{sha256(bytes(project)).hexdigest()[:16]}"
    directory.mkdir(exist_ok=True)
    assert directory.stat().st_uid == os.getuid(), f"{directory} belongs to another user"
    return directory
