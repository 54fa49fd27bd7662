"""Each documented place for a variable, and the environment that a process then gets.

The real tools read the files wherever they run without their server: podman-compose, Helm and
honcho. On Heroku and Dokku a config variable is the environment, so nothing has to be rendered.
"""

import json
import re
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from app.settings import Disabled, Settings
from deploy import generate
from tests.support import warm
from tests.support.processes import ROOT, minimal

DEPLOY = ROOT / "deploy"
ADMIN = "MIGRATION_DATABASE_URL"
SECRETS = ("DATABASE_URL", "REDIS_URL")
SWITCH = "TELEMETRY_ENABLED"

FILLED_IN = {
    "APP_VERSION": "v0.2.0",
    "CONSENTOS_NETWORK": "consentos_default",
    "DATABASE_URL": "postgresql://telemetry:secret@postgres:5432/consentos",
    ADMIN: "postgresql://consentos:secret@postgres:5432/consentos",
    "REDIS_URL": "redis://:secret@redis:6379/0",
}
"""What the examples leave to the operator."""


@dataclass(frozen=True)
class Given:
    """The environments that the processes of a deployment get."""

    sender: Mapping[str, str]
    owner: Mapping[str, str]
    """That of `migrate` and `grants`."""


def reason(environment: Mapping[str, str]) -> str | None:
    """Return why telemetry is off in exactly this environment, or None if it is on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.environ", dict(environment))
        gate = Settings.load().gate
    return gate.reason if isinstance(gate, Disabled) else None


def warnings(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return what a process warns of in exactly this environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.environ", dict(environment))
        return Settings.load().warnings


def with_lines(page: str, written: Mapping[str, str]) -> str:
    """Return a file in which an operator has set variables, in the words of the file.

    A line that sets the variable or has it as a comment is replaced. Every other line is added
    after the one of the switch, in the same form.
    """
    found = re.search(rf"(?m)^(?P<before> *(?:- )?){SWITCH}(?P<between>=|: )", page)
    assert found
    for name, value in written.items():
        line = f"{found['before']}{name}{found['between']}{value}"
        own = re.search(rf"(?m)^ *(?:# ?)?(?:- )?{name}(?:=|:).*\n", page)
        switch = re.search(rf"(?m)^ *(?:- )?{SWITCH}(?:=|:).*\n", page)
        assert switch
        start, end = own.span() if own else (switch.end(), switch.end())
        page = f"{page[:start]}{line}\n{page[end:]}"
    return page


class Place(ABC):
    """A documented place for variables."""

    name: str
    forms: tuple[str, ...] = ("%s", '"%s"', "'%s'")
    """The forms in which its file can hold a word."""
    empty_is_unset = False
    """Whether a name without a word after it counts as a variable that is not set."""

    @abstractmethod
    def given(self, directory: Path, written: Mapping[str, str]) -> Given:
        """Return what the processes get once an operator has written this into the files."""

    def as_written(self, name: str, value: str) -> str:
        """Return the words of the file for a variable's value."""
        assert name
        return value


class Compose(Place):
    """`.env` and `admin.env` beside compose.yaml, as podman-compose reads them."""

    name = "compose"

    def __init__(self, around: Mapping[str, str] | None = None) -> None:
        """Take the variables of the shell that compose is started in."""
        self._around = around or {}

    def given(self, directory: Path, written: Mapping[str, str], override: str = "") -> Given:
        started = self.started(directory, written, override)
        return Given(sender=started["telemetry"][0], owner=started["release"][0])

    def images(self, directory: Path, written: Mapping[str, str]) -> set[str]:
        """Return the names of the images that compose starts the containers from."""
        self.started(directory, written)
        calls = (directory / "deploy" / "calls").read_text()
        return set(re.findall(r"\0(consentos-telemetry:[^\0]+)\0", calls))

    def started(
        self, directory: Path, written: Mapping[str, str], override: str = ""
    ) -> dict[str, tuple[dict[str, str], list[str]]]:
        """Return the environment and the command of each container that compose starts."""
        there = directory / "deploy"
        there.mkdir(parents=True)
        shutil.copy(DEPLOY / "compose.yaml", there)
        shutil.copy(DEPLOY / "Dockerfile", there)
        everything = {**FILLED_IN, **written}
        owners = {ADMIN: everything.pop(ADMIN)}
        example = (DEPLOY / "env.example").read_text()
        (there / ".env").write_text(with_lines(example, everything))
        example = (DEPLOY / "admin.env.example").read_text()
        (there / "admin.env").write_text(re.sub(rf"(?m)^{ADMIN}=.*", "", example))
        with (there / "admin.env").open("a") as file:
            file.writelines(f"{name}={value}\n" for name, value in owners.items())
        if override:
            (there / "compose.override.yaml").write_text(override)
        return dict(containers(there, self._around))


def containers(
    there: Path, around: Mapping[str, str] | None = None
) -> Iterator[tuple[str, tuple[dict[str, str], list[str]]]]:
    """Yield the environment and our command of each container of the compose file in ``there``."""
    calls, stub = there / "calls", there / "bin" / "podman"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    variables = minimal({"CALLS": str(calls), **(around or {})})
    variables["PATH"] = f"{stub.parent}:{variables['PATH']}"
    compose = [sys.executable, "-m", "podman_compose", "up", "--detach", "--no-build"]
    warm.run(compose, variables, directory=there).check_returncode()
    for call in calls.read_text().split("\0\0"):
        words = call.split("\0")
        if words[0] == "create":
            pairs = [after for word, after in pairwise(words) if word == "-e"]
            (service,) = re.findall(r"\0io\.podman\.compose\.service=([\w-]+)", call)
            _, _, command = call.partition("\0consentos-telemetry:")
            environment = dict(pair.split("=", 1) for pair in pairs)
            yield service, (environment, command.split("\0")[1:])


STUB = """\
#!/bin/sh
# Stands for podman: remembers how it was called.
case "$1" in --version) echo "podman version 5.0.0";; ps) echo "[]";; esac
printf '%s\\0' "$@" '' >> "$CALLS"
"""


class Override(Compose):
    """`environment:` of the service, in a file that compose lays over its own."""

    name = "compose override"
    empty_is_unset = True  # it is null, and the file below decides

    def as_written(self, name: str, value: str) -> str:
        assert name
        return json.dumps(value)

    def given(self, directory: Path, written: Mapping[str, str], override: str = "") -> Given:
        assert not override
        lines = [f"      {name}: {value}\n" for name, value in written.items()]
        head = "services:\n  telemetry:\n    environment:\n"
        # The file that it is laid over says the opposite, and loses.
        return super().given(directory, {SWITCH: "true"}, head + "".join(lines))


def in_pod(pod: Mapping[str, Any], data: Mapping[str, str], everything: Mapping[str, str]) -> Given:
    """Return the environments of a pod: of two sources with a name, the later one wins."""
    secrets = {
        "consentos-telemetry": {name: everything[name] for name in SECRETS},
        "consentos-telemetry-admin": {ADMIN: everything[ADMIN]},
    }

    def environment(container: Mapping[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in container["envFrom"]:
            ((kind, reference),) = source.items()
            found.update(data if kind == "configMapRef" else secrets[reference["name"]])
        return found

    (sender,) = pod["containers"]
    owner, same = (environment(each) for each in pod["initContainers"])
    assert owner == same
    return Given(sender=environment(sender), owner=owner)


def apart(written: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return what belongs into the ConfigMap, and what is in Secrets."""
    secret = {*SECRETS, ADMIN}
    everything = {**FILLED_IN, **written}
    public = {name: value for name, value in everything.items() if name not in secret}
    del public["CONSENTOS_NETWORK"]
    return public, everything


class Helm(Place):
    """`env` in the values of the chart, as Helm itself renders it."""

    name = "helm"

    def as_written(self, name: str, value: str) -> str:
        return value if name in {*SECRETS, ADMIN} else json.dumps(value)

    def given(self, directory: Path, written: Mapping[str, str]) -> Given:
        assert directory
        public, everything = apart(written)
        lines = [f"  {name}: {value}\n" for name, value in public.items()]
        values = helm_python.values_from_yaml("env:\n" + "".join(lines))
        objects = generate.rendered(**values)
        pod = objects["Deployment"]["spec"]["template"]["spec"]
        return in_pod(pod, objects["ConfigMap"]["data"], everything)


class Kustomize(Place):
    """Literals in kustomization.yaml; kustomize takes quotes around a value off."""

    name = "kustomize"

    def given(self, directory: Path, written: Mapping[str, str]) -> Given:
        assert directory
        public, everything = apart(written)
        page = with_lines((DEPLOY / "kubernetes" / "kustomization.yaml").read_text(), public)
        (generator,) = yaml.safe_load(page)["configMapGenerator"]
        assert generator.keys() == {"name", "literals"}
        pairs = (literal.split("=", 1) for literal in generator["literals"])
        data = {name: re.sub(r"""^(["'])(.*)\1$""", r"\2", value) for name, value in pairs}
        pod = yaml.safe_load(generate.DEPLOYMENT.read_text())["spec"]["template"]["spec"]
        return in_pod(pod, data, everything)


class Systemd(Place):
    """The files that `EnvironmentFile=` names, read by systemd's rules."""

    name = "systemd"

    def given(self, directory: Path, written: Mapping[str, str]) -> Given:
        assert directory
        everything = {**FILLED_IN, **written}
        owners = {ADMIN: everything.pop(ADMIN)}
        del everything["CONSENTOS_NETWORK"]
        files = {
            "env": with_lines((DEPLOY / "systemd" / "env.example").read_text(), everything),
            "admin": "".join(f"{name}={value}\n" for name, value in owners.items()),
        }

        def environment(page: str) -> dict[str, str]:
            named = re.findall(r"EnvironmentFile=-?/etc/consentos-telemetry/(\w+)", page)
            return {name: value for file in named for name, value in of_a_unit(files[file]).items()}

        return Given(
            sender=environment((DEPLOY / "systemd" / "consentos-telemetry.conf").read_text()),
            owner=environment((DEPLOY / "systemd" / "consentos-telemetry").read_text()),
        )


_PART = re.compile(
    r"""\s*(?:'(?P<single>[^']*)'|"(?P<double>(?:\\.|[^"\\])*)"|(?P<bare>(?:\\.|[^\\\n])+))""",
    re.DOTALL,
)


def of_a_unit(page: str) -> dict[str, str]:
    """Return the variables of an environment file, as systemd.exec(5) says.

    A comment has a line of its own. White space around an unquoted value is dropped.
    """
    found = {}
    for line in page.splitlines():
        name, equals, rest = line.strip().partition("=")
        if not equals or name.startswith(("#", ";")):
            continue
        value = ""
        for part in _PART.finditer(rest):
            if part["single"] is not None:
                value += part["single"]
            elif part["double"] is not None:
                value += re.sub(r'\\(["\\`$])', r"\1", part["double"])
            else:
                value += re.sub(r"\\(.)", r"\1", part["bare"].rstrip())
        found[name.strip()] = value
    return found


class Honcho(Place):
    """The `.env` that the operator fills in, as honcho reads it, and the owner's URL."""

    name = "honcho"
    empty_is_unset = True

    def given(self, directory: Path, written: Mapping[str, str]) -> Given:
        example = (DEPLOY / "honcho" / "env.example").read_text()
        everything = {**FILLED_IN, **written}
        owners = {ADMIN: everything.pop(ADMIN)}
        del everything["CONSENTOS_NETWORK"]
        (directory / ".env").write_text(with_lines(example, everything))
        return Given(sender=self._run(directory, {}), owner=self._run(directory, owners))

    def _run(self, directory: Path, around: Mapping[str, str]) -> dict[str, str]:
        """Return what a command gets that is started with these variables before it."""
        show = "import json, os; print(json.dumps(dict(os.environ)))"
        honcho = [sys.executable, "-m", "honcho", "run", sys.executable, "-c", show]
        ran = warm.run(honcho, minimal(around), directory=directory)
        ran.check_returncode()
        found: dict[str, str] = json.loads(ran.stdout)
        return found


PLACES: tuple[Place, ...] = (Compose(), Override(), Helm(), Kustomize(), Systemd(), Honcho())
