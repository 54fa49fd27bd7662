"""The README's way to run it on a machine of one's own, line by line as a new user types it."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from sqlalchemy import make_url

from app import __version__, database
from demo import consentos
from tests.conftest import Databases
from tests.support.command import PASSWORD
from tests.support.processes import ROOT, Process, Processes

README = (ROOT / "README.md").read_text()
OWN_MACHINE = README.partition("**On a machine of your own**")[2]
INSTALL, CHECK = re.findall(r"(?ms)^```bash\n(.*?)^```", OWN_MACHINE)[:2]
EXAMPLE = "deploy/honcho/env.example"
FILL_IN = "# then fill it in\n"

PYTHON3 = """\
#!/bin/sh
# Stands for Debian's python3, which makes the virtual environment: here, out of that of the tests.
[ "$*" = "-m venv .venv" ] || exit 64
mkdir -p .venv/bin
for name in python honcho; do
    printf '#!/bin/sh\\nexec "%s/%s" "$@"\\n' "$TESTS" "$name" > .venv/bin/$name
done
printf '#!/bin/sh\\necho "$*" >> pip.calls\\n' > .venv/bin/pip
chmod 755 .venv/bin/*
echo 'PATH="$PWD/.venv/bin:$PATH"' > .venv/bin/activate
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout, and a machine that has no Python but `python3`."""
    there = tmp_path / "checkout"
    there.mkdir()
    for name in ("Procfile", "requirements.txt", "app", "workers", "migrations", "deploy"):
        (there / name).symlink_to(ROOT / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python3").write_text(PYTHON3)
    (tools / "python3").chmod(0o755)
    for name in ("bash", "sh", "cat", "chmod", "install", "mkdir"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    return there


@pytest.fixture
def role(databases: Databases) -> Iterator[str]:
    """A name for the small role, which no server has yet."""
    name = f"telemetry_{uuid4().hex}"
    yield name
    databases.drop_role(name)


@pytest.fixture
def consentos_url(role: str, databases: Databases) -> Iterator[str]:
    """The owner's URL of a ConsentOS database without telemetry."""
    assert role  # goes after the database in which it has rights
    with databases.copy_of("template1") as url:
        with database.engine(url).begin() as connection:
            consentos.create_tables(connection)
            consentos.populate(connection)
        yield url


def filled_in(page: str, values: Mapping[str, str]) -> str:
    """Return a page with this machine's values in the place of those that it leaves open."""
    for written, value in values.items():
        assert page.count(written) == 1
        page = page.replace(written, value)
    assert "…" not in page
    return page


@pytest.fixture
def machine(checkout: Path, tmp_path: Path) -> Iterator[Processes]:
    environment = {
        "PATH": str(checkout.parent / "bin"),
        "HOME": str(tmp_path),
        "TESTS": str(Path(sys.executable).parent),
    }
    running = Processes(environment, tmp_path)
    yield running
    running.end()


def typed(machine: Processes, checkout: Path, commands: str) -> Process:
    """Start the commands in a shell of their own, which ends at the first that fails."""
    script = checkout.parent / f"{uuid4().hex}.sh"
    script.write_text(commands)
    return machine.run(f"cd {shlex.quote(str(checkout))} && exec bash -e {script}")


def senders(shell: Process) -> list[psutil.Process]:
    family = psutil.Process(shell.pid).children(recursive=True)
    return [each for each in family if each.cmdline()[1:] == ["-m", "workers.solo"]]


def test_the_operators_page_installs_in_the_same_way() -> None:
    assert f"```bash\n{INSTALL}```" in (ROOT / "docs" / "operate.md").read_text()


def test_on_a_machine_of_ones_own_each_line_works_as_it_is_written(
    machine: Processes, checkout: Path, role: str, consentos_url: str, redis_url: str
) -> None:
    small = make_url(consentos_url).set(username=role, password=PASSWORD)
    values = {
        "postgresql://telemetry:…@localhost:5432/consentos": small.render_as_string(
            hide_password=False
        ),
        "redis://:…@localhost:6379/0": redis_url,
        "APP_VERSION=\n": "APP_VERSION=v0.2.0\n",
    }
    by_hand = checkout.parent / "filled_in"
    by_hand.write_text(filled_in((ROOT / EXAMPLE).read_text(), values))
    assert f" {EXAMPLE} .env " in INSTALL
    commands = filled_in(
        INSTALL,
        {
            "postgresql://consentos:…@localhost:5432/consentos": shlex.quote(consentos_url),
            "--role telemetry ": f"--role {role} ",
            FILL_IN: f"{FILL_IN}cat {by_hand} > .env\n",
        },
    )
    shell = typed(machine, checkout, commands)
    shell.wait_for("telemetry.notice")
    (locked,) = re.findall(r"(?m)^honcho==\S+", (ROOT / "requirements/dev.txt").read_text())
    installed = (checkout / "pip.calls").read_text().splitlines()
    assert installed == [
        "install --require-hashes -r requirements.txt",
        f"install {locked.rstrip(chr(92)).strip()}",
    ]
    assert (checkout / ".env").stat().st_mode & 0o777 == 0o600

    status = typed(machine, checkout, CHECK)
    assert status.wait(30) == 0, status.output()
    shown = dict(re.findall(r"(?m)^(\w+(?: \w+)?)  +(.*?) *$", status.output()))
    assert shown["telemetry"] == "on"
    assert shown["version"] == "0.2.0"
    assert shown["release"] == __version__
    assert shown["notice"] != "not given yet"
    assert shown["rights"].startswith("no more than it needs")
    assert shown["redis"] == "answers"
    assert "warning" not in shown

    (sender,) = senders(shell)
    environment = sender.environ()
    assert make_url(environment["DATABASE_URL"]).username == role
    assert "MIGRATION_DATABASE_URL" not in environment
