"""The operator's commands as an operator runs them, and other code: a process of its own."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import make_url

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
    return _run(variables, ["-m", "app", *arguments], typed)


def commands(environment: Mapping[str, str], *lines: str, typed: str = "") -> list[Ended]:
    """Run several commands one after the other in one process, to save time."""
    return commands_each_in(environment, [(line, {}) for line in lines], typed)


def commands_each_in(
    environment: Mapping[str, str], lines: list[tuple[str, dict[str, str]]], typed: str = ""
) -> list[Ended]:
    """Run several commands in one process, each with variables of its own changed."""
    ended = _run(environment, ["-c", SEVERAL], json.dumps({"lines": lines, "typed": typed}))
    assert (ended.code, ended.err) == (0, "")
    return [Ended(**each) for each in ended.json]


def python(environment: Mapping[str, str], code: str) -> str:
    """Run some Python and return what it prints."""
    ended = _run(environment, ["-c", code], "")
    assert ended.code == 0, ended.err
    return ended.out


SEVERAL = """
import contextlib, io, json, os, sys
from app import cli

def run(line, changed):
    before = dict(os.environ)
    os.environ.update(changed)
    sys.argv[1:] = line.split()
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
    os.environ.clear()
    os.environ.update(before)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}

given = json.load(sys.stdin)
sys.stdin = io.StringIO(given["typed"])
print(json.dumps([run(*each) for each in given["lines"]]))
"""


def _run(environment: Mapping[str, str], arguments: list[str], typed: str) -> Ended:
    """Run Python; whatever it prints, it is neither a password nor a traceback.

    Every database URL without a password is given one.
    """
    variables = dict(environment)
    for name in variables.keys() & {"DATABASE_URL", "MIGRATION_DATABASE_URL"}:
        variables[name] = with_password(variables[name])
    ended = subprocess.run(
        [sys.executable, *arguments],
        input=typed,
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env=minimal(variables),
        timeout=100,
        check=False,
    )
    for said in (ended.stdout, ended.stderr):
        assert PASSWORD not in said
        assert "Traceback" not in said, said
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def with_password(url: str) -> str:
    if not url.startswith("postgresql") or PASSWORD in url:
        return url
    parsed = make_url(url)
    return parsed.set(password=parsed.password or PASSWORD).render_as_string(hide_password=False)
