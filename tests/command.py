"""The operator's commands as an operator runs them: a process of its own."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import make_url

from tests.processes import ROOT, minimal

PASSWORD = "correct-horse-battery"  # noqa: S105 - only to see that nothing prints it


@dataclass(frozen=True)
class Ended:
    """A command that has ended, with what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """What it said on stderr, which has to be one line and one sentence."""
        (line,) = self.err.splitlines()
        assert line.startswith("consentos-telemetry: "), line
        assert line.endswith("."), line
        return line.removeprefix("consentos-telemetry: ")


def command(
    environment: Mapping[str, str], *arguments: str, typed: str = "", **changed: str | None
) -> Ended:
    """Run ``python -m app`` with some variables changed, or removed where they are None.

    Every database URL without a password is given one, and whatever the command prints, it is
    neither that nor a traceback.
    """
    variables = {
        name: word for name, word in {**environment, **changed}.items() if word is not None
    }
    for name in variables.keys() & {"DATABASE_URL", "MIGRATION_DATABASE_URL"}:
        variables[name] = with_password(variables[name])
    ended = subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        input=typed,
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env=minimal(variables),
        timeout=60,
        check=False,
    )
    for said in (ended.stdout, ended.stderr):
        assert PASSWORD not in said
        assert "Traceback" not in said
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def with_password(url: str) -> str:
    if not url.startswith("postgresql") or PASSWORD in url:
        return url
    parsed = make_url(url)
    return parsed.set(password=parsed.password or PASSWORD).render_as_string(hide_password=False)
