"""The operator's commands as an operator runs them, and other code: a process of its own."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import make_url

from tests.support import warm
from tests.support.processes import ROOT, minimal

PASSWORD = "correct-horse-battery"  # noqa: S105 - only to see that nothing prints it


@dataclass(frozen=True)
class Ended:
    """A command that has ended, with its output."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """Its output on stderr, which must be one line and one sentence."""
        (line,) = self.err.splitlines()
        assert line.startswith("consentos-telemetry: "), line
        assert line.endswith("."), line
        return line.removeprefix("consentos-telemetry: ")


def command(
    environment: Mapping[str, str], *arguments: str, typed: str = "", **changed: str | None
) -> Ended:
    """Run ``python -m app`` with some variables changed, or removed where they are None."""
    changes = {**environment, **changed}
    variables = {name: value for name, value in changes.items() if value is not None}
    argv = [sys.executable, "-m", "app", *arguments]
    return _checked(warm.run(argv, minimal(with_passwords(variables)), typed=typed))


def commands(environment: Mapping[str, str], *lines: str) -> list[Ended]:
    """Run several commands one after the other."""
    return [command(environment, *line.split()) for line in lines]


def commands_each_in(
    environment: Mapping[str, str], lines: list[tuple[str, dict[str, str]]]
) -> list[Ended]:
    """Run several commands one after the other, each with variables of its own changed."""
    return [command({**environment, **own}, *line.split()) for line, own in lines]


def python(environment: Mapping[str, str], code: str) -> str:
    """Run some Python in an interpreter that has imported nothing yet; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env=minimal(with_passwords(environment)),
        timeout=100,
        check=False,
    )
    ended = _checked(done)
    assert ended.code == 0, ended.err
    return ended.out


def _checked(done: subprocess.CompletedProcess[str]) -> Ended:
    """Return how a command ended; no output contains a password or a traceback."""
    for printed in (done.stdout, done.stderr):
        assert PASSWORD not in printed
        assert "Traceback" not in printed, printed
    return Ended(done.returncode, done.stdout, done.stderr)


def with_passwords(environment: Mapping[str, str]) -> dict[str, str]:
    """Give a password to each database URL that has none."""
    databases = environment.keys() & {"DATABASE_URL", "MIGRATION_DATABASE_URL"}
    return {**environment, **{name: with_password(environment[name]) for name in databases}}


def with_password(url: str) -> str:
    if not url.startswith("postgresql") or PASSWORD in url:
        return url
    parsed = make_url(url)
    return parsed.set(password=parsed.password or PASSWORD).render_as_string(hide_password=False)
