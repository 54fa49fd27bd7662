"""The Makefile's own words, where no other test runs them."""

import subprocess
from pathlib import Path

from tests.support.processes import ROOT
from tests.support.room import room


def test_clean_deletes_what_servers_have_left_in_memory(tmp_path: Path) -> None:
    directory = room(tmp_path)
    (directory / "left").touch()
    subprocess.run(["make", "-f", ROOT / "Makefile", "clean"], cwd=tmp_path, check=True)
    assert not directory.exists()
