"""What is deployed runs the Procfile's own lines, with no right and no secret too many."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python
import pytest
import typer.main
import yaml

import app.cli  # noqa: F401 - has every command register itself
from app import __version__
from app.cli.entry import app as cli
from app.settings import Settings
from app.settings.collector import CollectorSettings
from deploy import generate
from tests.support.command import PASSWORD
from tests.support.processes import ROOT, line, minimal
from tests.unit.places import ADMIN, DEPLOY, Compose, Kustomize, reason

COMPOSE = DEPLOY / "compose.yaml"
KUSTOMIZATION = DEPLOY / "kubernetes" / "kustomization.yaml"
UNIT_ENVIRONMENT = DEPLOY / "systemd" / "env.example"
PAGE = ROOT / "docs" / "operate.md"


def procfile(name: str) -> list[str]:
    """Return the words of a line of the Procfile that are run in the shell's place."""
    return shlex.split(line(name).removeprefix("exec "))


# docker compose


def services(page: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(page)["services"]
    return found


class TestCompose:
    def test_is_what_the_compose_specification_allows(self) -> None:
        check = [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.compose-spec",
        ]
        checked = subprocess.run(
            [*check, str(COMPOSE)], capture_output=True, encoding="utf-8", check=False
        )
        assert checked.returncode == 0, checked.stdout

    def test_sets_no_variable_that_would_win_over_the_operators_file(self) -> None:
        page = COMPOSE.read_text()
        assert not [name for name, each in services(page).items() if "environment" in each]
        read = re.findall(r"\$\{([A-Z_]+)[^}]*\}", page)
        assert read == ["CONSENTOS_TELEMETRY_TAG", "CONSENTOS_NETWORK"]

    def test_takes_no_default_for_the_network(self) -> None:
        assert "${CONSENTOS_NETWORK:?" in COMPOSE.read_text()

    def test_runs_solo_when_the_release_has_succeeded(self) -> None:
        telemetry = services(COMPOSE.read_text())["telemetry"]
        assert telemetry["command"] == procfile("solo")
        assert telemetry["depends_on"] == {
            "release": {"condition": "service_completed_successfully"}
        }

    def test_releases_as_the_procfile_does_and_grants(self) -> None:
        release = services(COMPOSE.read_text())["release"]
        shell, option, script = release["command"]
        (commands,) = re.findall(r"until (.*); do", script)
        migrate, grants = (shlex.split(each) for each in commands.split(" && "))
        assert (shell, option, release["restart"]) == ("sh", "-c", "no")
        assert migrate == procfile("release")
        assert understood(migrate) == "migrate"
        assert understood(grants) == "grants"

    def test_gives_the_owners_file_to_the_release_alone(self) -> None:
        found = services(COMPOSE.read_text())
        files = {name: each["env_file"] for name, each in found.items()}
        assert files == {"release": [".env", "admin.env"], "telemetry": [".env"]}
        assert ADMIN not in (DEPLOY / "env.example").read_text()
        assert "secrets" not in found["telemetry"]

    @pytest.mark.parametrize("name", ["telemetry", "release"])
    def test_leaves_a_container_nothing_that_it_does_not_need(self, name: str) -> None:
        service = services(COMPOSE.read_text())[name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"]
        assert {"user", "privileged", "cap_add", "ports", "volumes"}.isdisjoint(service)


PYTHON = """\
#!/bin/sh
# Stands for python: says how it was called, and ends with the next of the codes.
echo "$@" >> calls
code=$(head -n 1 codes)
sed -i 1d codes
exit "$code"
"""


class TestTheReleaseOfCompose:
    def start(self, there: Path, *codes: int, pause: str = "exit 0") -> subprocess.Popen[str]:
        """Start the script as compose hands it to the container, with these ends of `python`."""
        made = there / "compose"
        made.mkdir()
        _, command = Compose().started(made, {})["release"]
        (there / "codes").write_text("".join(f"{code}\n" for code in codes))
        for name, script in {"python": PYTHON, "sleep": f"#!/bin/sh\n{pause}\n"}.items():
            (there / name).write_text(script)
            (there / name).chmod(0o755)
        return subprocess.Popen(
            command,
            cwd=there,
            env={"PATH": f"{there}:/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )

    def test_migrates_and_then_grants(self, tmp_path: Path) -> None:
        with self.start(tmp_path, 0, 0) as release:
            assert release.wait(10) == 0
        calls = (tmp_path / "calls").read_text().splitlines()
        assert calls == ["-m app migrate", "-m app grants --role telemetry --apply"]

    def test_tries_again_until_consentos_has_been_migrated(self, tmp_path: Path) -> None:
        with self.start(tmp_path, 1, 1, 0, 1, 0, 0) as release:
            out, _ = release.communicate(timeout=10)
        assert release.returncode == 0
        assert len((tmp_path / "calls").read_text().splitlines()) == 6
        assert out.count("Trying again in 15 seconds.") == 3

    @pytest.mark.parametrize("code", [2, 126, 127, 130])
    def test_ends_with_the_code_of_what_another_try_would_not_mend(
        self, code: int, tmp_path: Path
    ) -> None:
        with self.start(tmp_path, 1, code) as release:
            assert release.wait(10) == code

    def test_stops_at_once_while_it_waits(self, tmp_path: Path) -> None:
        with self.start(tmp_path, 1, pause="exec /bin/sleep 60") as release:
            assert release.stdout
            assert release.stdout.readline() == "Trying again in 15 seconds.\n"
            os.killpg(release.pid, signal.SIGTERM)
            assert release.wait(5) == -signal.SIGTERM
        # As the first process of a container the shell would not hear of it.
        assert services(COMPOSE.read_text())["release"]["init"] is True


# Kubernetes


def manifests() -> dict[str, dict[str, Any]]:
    """Return the Deployment that each of the two ways applies."""
    return {
        "helm": generate.rendered()["Deployment"],
        "kustomize": yaml.safe_load(generate.DEPLOYMENT.read_text()),
    }


@pytest.fixture(params=["helm", "kustomize"])
def manifest(request: pytest.FixtureRequest) -> dict[str, Any]:
    return manifests()[request.param]


@pytest.fixture
def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return found


def containers(pod: Mapping[str, Any]) -> dict[str, Any]:
    return {each["name"]: each for each in (*pod["initContainers"], *pod["containers"])}


def sources(container: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return where a container has its environment from."""
    return [(kind, ref["name"]) for each in container["envFrom"] for kind, ref in each.items()]


class TestKubernetes:
    def test_has_a_manifest_for_kustomize_that_is_generated_from_the_chart(self) -> None:
        assert generate.DEPLOYMENT.read_text() == generate.deployment(), "run `make docs`"

    def test_has_a_chart_in_which_helm_finds_nothing_wrong(self) -> None:
        report = helm_python.lint(generate.CHART, strict=True)
        assert report["errors"] == []
        assert {each["error"] for each in report["messages"]} == {"icon is recommended"}

    def test_has_a_chart_that_refuses_what_it_does_not_know(self) -> None:
        unknown: tuple[dict[str, Any], ...] = (
            {"telemetry": {"env": {}}},
            {"enviroment": {}},
            {"image": {"tga": "1"}},
        )
        for values in unknown:
            with pytest.raises(helm_python.HelmValuesError, match="not allowed"):
                generate.rendered(**values)

    @pytest.mark.parametrize("value", [None, {}, ["false"]])
    def test_has_a_chart_that_refuses_what_is_no_word(self, value: object) -> None:
        with pytest.raises(helm_python.HelmValuesError, match="SOMETHING"):
            generate.rendered(env={"SOMETHING": value})

    def test_has_a_chart_that_refuses_no_environment_at_all(self) -> None:
        with pytest.raises(helm_python.HelmValuesError, match="env"):
            generate.rendered(env=None)

    @pytest.mark.parametrize("name", ["DATABASE_URL", ADMIN, "REDIS_URL"])
    def test_has_a_chart_that_refuses_a_password_in_the_configmap(self, name: str) -> None:
        with pytest.raises(helm_python.HelmValuesError, match=name):
            generate.rendered(env={name: "postgresql://"})

    def test_has_a_chart_that_writes_a_number_as_a_person_does(self) -> None:
        data = generate.rendered(env={"A": 1000000, "B": 2.5, "C": False, "D": 0, "E": ""})
        arrived = data["ConfigMap"]["data"]
        assert [arrived[name] for name in "ABCDE"] == ["1000000", "2.5", "false", "0", ""]

    def test_has_a_chart_that_restarts_the_pod_with_each_change(self) -> None:
        def checksum(**values: object) -> str:
            template = generate.rendered(**values)["Deployment"]["spec"]["template"]
            return str(template["metadata"]["annotations"]["checksum/env"])

        assert checksum() == checksum()
        assert checksum() != checksum(env={"TELEMETRY_ENABLED": False})
        assert checksum() != checksum(env={"TELEMETRY_ENDPIONT": "x"})

    def test_has_a_chart_that_takes_what_a_cluster_needs(self) -> None:
        values: dict[str, Any] = {
            "image": {"repository": "registry.example/telemetry", "tag": "1.2.3"},
            "imagePullSecrets": [{"name": "registry"}],
            "volumes": [{"name": "ca", "configMap": {"name": "ca"}}],
            "volumeMounts": [{"name": "ca", "mountPath": "/ca"}],
            "nodeSelector": {"disk": "ssd"},
            "tolerations": [{"operator": "Exists"}],
            "secret": "mine",
            "adminSecret": "owners",
        }
        pod = generate.rendered(**values)["Deployment"]["spec"]["template"]["spec"]
        for container in containers(pod).values():
            assert container["image"] == "registry.example/telemetry:1.2.3"
            assert container["volumeMounts"] == values["volumeMounts"]
            assert ("secretRef", "mine") in sources(container)
        assert ("secretRef", "owners") in sources(containers(pod)["grants"])
        for name in ("imagePullSecrets", "volumes", "nodeSelector", "tolerations"):
            assert pod[name] == values[name]

    def test_restarts_the_pod_with_each_change_of_the_switch(self, pod: dict[str, Any]) -> None:
        kustomization = yaml.safe_load(KUSTOMIZATION.read_text())
        (generator,) = kustomization["configMapGenerator"]
        assert "generatorOptions" not in kustomization
        assert generator.keys() == {"name", "literals"}
        for container in containers(pod).values():
            assert sources(container)[0] == ("configMapRef", generator["name"])

    def test_ends_the_old_pod_before_the_new_one_has_to_migrate(
        self, manifest: dict[str, Any]
    ) -> None:
        assert manifest["spec"]["strategy"] == {"type": "Recreate"}
        assert manifest["spec"]["replicas"] == 1

    def test_lets_no_service_put_variables_into_the_pod(self, pod: dict[str, Any]) -> None:
        injected = {"TELEMETRY_SERVICE_HOST": "10.0.0.1"}
        assert reason({**Kustomize().given(Path(), {}).sender, **injected})
        assert pod["enableServiceLinks"] is False

    def test_runs_solo_after_what_the_procfile_releases_and_the_grants(
        self, pod: dict[str, Any]
    ) -> None:
        commands = {name: each["command"] for name, each in containers(pod).items()}
        assert list(commands) == ["migrate", "grants", "solo"]
        assert commands["solo"] == procfile("solo")
        assert commands["migrate"] == procfile("release")
        assert understood(commands["grants"]) == "grants"

    def test_gives_the_owners_secret_to_the_init_containers_alone(
        self, pod: dict[str, Any]
    ) -> None:
        admin = ("secretRef", "consentos-telemetry-admin")
        having = [name for name, each in containers(pod).items() if admin in sources(each)]
        assert having == ["migrate", "grants"]
        assert sources(containers(pod)["solo"])[1:] == [("secretRef", "consentos-telemetry")]
        assert not [name for name, each in containers(pod).items() if "env" in each]
        assert "volumes" not in pod

    def test_keeps_to_the_restricted_pod_security_standard(self, pod: dict[str, Any]) -> None:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in containers(pod).values():
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]

    def test_asks_for_health_what_compose_asks_and_nothing_else(self, pod: dict[str, Any]) -> None:
        solo = containers(pod)["solo"]
        _, *asked = services(COMPOSE.read_text())["telemetry"]["healthcheck"]["test"]
        assert solo["livenessProbe"]["exec"]["command"] == asked
        assert understood(asked) == "status"
        assert {"readinessProbe", "startupProbe", "lifecycle"}.isdisjoint(solo)


# The image


def instructions() -> list[tuple[str, str]]:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    words = [each.split(" ", 1) for each in lines if each and not each.startswith("#")]
    return [(name, rest) for name, rest in words]


def instruction(name: str) -> str:
    (found,) = [rest for each, rest in instructions() if each == name]
    return found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A directory with what the image has in its own: what is copied and not ignored."""
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    sent = {each.removeprefix("!") for each in ignored if each.startswith("!")}
    kept_back = [each.removeprefix("**/") for each in ignored[1:] if not each.startswith("!")]

    def ignore(directory: str, names: list[str]) -> set[str]:
        here = Path(directory).relative_to(ROOT)
        return {
            name
            for name in names
            for pattern in kept_back
            if fnmatch.fnmatch(str(here / name), pattern) or name == pattern
        }

    there = tmp_path / "image"
    there.mkdir()
    for name, rest in instructions():
        if name == "COPY":
            source, target = rest.split()
            assert source in sent
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, there / target, ignore=ignore)
            else:
                shutil.copy(ROOT / source, there / target)
    return there


LOADED = """
import json, sys
from app import cli
from workers import solo
import app.collector.__main__
print(json.dumps([m.__file__ for n, m in sys.modules.items()
                  if n.split(".")[0] in ("app", "workers", "migrations", "tests", "bench")]))
"""


class TestTheImage:
    def run(self, image: Path, *arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=image,
            env=minimal({"PYTHONDONTWRITEBYTECODE": "1"}),
            capture_output=True,
            encoding="utf-8",
            check=True,
        ).stdout

    def test_holds_all_that_its_commands_and_its_process_load(self, image: Path) -> None:
        loaded = [Path(file) for file in json.loads(self.run(image, "-c", LOADED))]
        assert len(loaded) > 20
        assert [file for file in loaded if not file.is_relative_to(image)] == []
        assert "migrate" in self.run(image, "-m", "app", "--help")
        assert json.loads(self.run(image, "-m", "app", "schema"))["title"] == "Heartbeat"

    def test_is_not_written_to(self, image: Path) -> None:
        assert "PYTHONDONTWRITEBYTECODE=1" in instruction("ENV")
        before = sorted(image.rglob("*"))
        self.run(image, "-m", "app", "schema")
        assert sorted(image.rglob("*")) == before
        _, compiled = (rest for name, rest in instructions() if name == "RUN")
        assert compiled.endswith("python -m compileall -q app migrations workers")

    def test_has_neither_the_demo_nor_the_tests_nor_what_a_checkout_keeps_to_itself(
        self, image: Path
    ) -> None:
        assert {each.name for each in image.iterdir()} == {
            "requirements.txt",
            "app",
            "migrations",
            "workers",
        }
        assert not (image / "app" / "demo").exists()
        assert not list(image.rglob("__pycache__"))

    def test_runs_solo_as_nobody_in_particular_and_is_stopped_as_the_processes_are(self) -> None:
        user, group = map(int, instruction("USER").split(":"))
        assert min(user, group) > 0
        assert json.loads(instruction("CMD")) == procfile("solo")
        assert instruction("STOPSIGNAL") == "SIGTERM"
        assert "ENTRYPOINT" not in dict(instructions())

    def test_installs_what_is_locked_on_the_python_that_is_developed_on(self) -> None:
        python = (ROOT / ".python-version").read_text().strip()
        assert instruction("FROM") == f"python:{python}-slim"
        install, _ = (rest for name, rest in instructions() if name == "RUN")
        assert install == "pip install --no-cache-dir --require-hashes -r requirements.txt"

    @pytest.mark.parametrize("file", generate.VERSIONED, ids=lambda path: path.name)
    def test_has_one_version_which_every_file_has_from_one_place(self, file: Path) -> None:
        assert file.read_text() == generate.with_version(file), "run `make docs`"

    def test_is_called_by_the_release_unless_its_builder_says_otherwise(
        self, tmp_path: Path
    ) -> None:
        name = f"consentos-telemetry:{__version__}"
        (image,) = yaml.safe_load(KUSTOMIZATION.read_text())["images"]
        assert image == {"name": "consentos-telemetry", "newName": "consentos-telemetry"}
        for manifest in manifests().values():
            pod = manifest["spec"]["template"]["spec"]
            assert {each["image"] for each in containers(pod).values()} == {name}
        chart = yaml.safe_load((generate.CHART / "Chart.yaml").read_text())
        assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
        assert Compose().images(tmp_path, {}) == {name}

    def test_is_called_by_the_tag_that_its_builder_says(self, tmp_path: Path) -> None:
        tag = "0.1.0-3-g1234567-dirty"
        written = {"CONSENTOS_TELEMETRY_TAG": tag}
        assert Compose().images(tmp_path, written) == {f"consentos-telemetry:{tag}"}
        assert reason({**Compose().given(tmp_path / "again", {**written}).sender}) is None

    @pytest.mark.parametrize("page", [PAGE, DEPLOY / "Dockerfile"], ids=lambda page: page.name)
    def test_is_built_with_another_tag_for_each_commit(self, page: Path) -> None:
        lines = re.sub(r"(?m)^# ", "", page.read_text())
        (built,) = re.findall(r"(?m)^TAG=(.*)\ndocker build (.*) \.$", lines)
        assert built[0].startswith("$(git describe --tags --always --dirty)")
        assert re.search(r' --tag "\S*consentos-telemetry:\$TAG"$', built[1])


# systemd


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The units that the documented command exports, where a secret lies in wait for them."""
    checkout = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "Procfile", checkout)
    secret = f"DATABASE_URL=postgresql://telemetry:{PASSWORD}@localhost/consentos"
    (checkout / ".env").write_text(f"{secret}\n")
    (documented,) = [each for each in shell_lines() if " export " in each and "honcho" in each]
    _, *arguments, location = shlex.split(documented)
    assert location == "/etc/systemd/system"
    subprocess.run(
        [sys.executable, "-m", "honcho", *arguments, "units"],
        cwd=checkout,
        env=minimal(dict([secret.split("=", 1)])),
        capture_output=True,
        check=True,
    )
    return {unit.name: unit.read_text() for unit in (checkout / "units").iterdir()}


class TestSystemd:
    def test_runs_solo_and_nothing_else(self, units: dict[str, str]) -> None:
        assert set(units) == {
            "consentos-telemetry.target",
            "consentos-telemetry-solo.target",
            "consentos-telemetry-solo-1.service",
        }
        service = units["consentos-telemetry-solo-1.service"]
        assert f"ExecStart=/bin/sh -lc '{line('solo')}'\n" in service
        assert "User=consentos-telemetry\n" in service
        assert not [name for name, unit in units.items() if "migrate" in unit or "release" in unit]

    def test_keeps_every_secret_out_of_the_units(self, units: dict[str, str]) -> None:
        assert not [name for name, unit in units.items() if PASSWORD in unit or "URL" in unit]

    def test_gives_the_units_one_file_of_their_own_as_environment(
        self, units: dict[str, str]
    ) -> None:
        drop_in = (DEPLOY / "systemd" / "consentos-telemetry.conf").read_text()
        read = re.findall(r"(?m)^EnvironmentFile=(.*)$", drop_in)
        assert read == ["/etc/consentos-telemetry/env"]
        # systemd has a name that ends in a hyphen be about every unit that begins with it.
        every = "/etc/systemd/system/consentos-telemetry-.service.d"
        assert f"install -D -m 0644 -t {every} " in PAGE.read_text()
        assert every in drop_in
        assert not [name for name, unit in units.items() if "EnvironmentFile" in unit]
        assert ADMIN not in UNIT_ENVIRONMENT.read_text() + drop_in

    def test_gives_the_operators_command_the_units_environment_and_the_owners_url(self) -> None:
        command = (DEPLOY / "systemd" / "consentos-telemetry").read_text()
        read = re.findall(r"EnvironmentFile=-?(\S+)", command)
        assert read == ["/etc/consentos-telemetry/env", "/etc/consentos-telemetry/admin"]
        assert ADMIN in (DEPLOY / "systemd" / "admin.example").read_text()


# Whatever is set anywhere


OWN = {".env", "admin.env", "telemetry.env", "collector.env", "compose.override.yaml"}
"""What an operator has written, in a checkout that is in use."""

FILES = sorted(
    path
    for path in DEPLOY.rglob("*")
    if path.is_file() and path.suffix not in {".py", ".pyc"}
    if path.name not in OWN and path.parent.name not in {"tls", "acme"}
)
ELSEWHERE = {
    *("CONSENTOS_NETWORK", "CONSENTOS_TELEMETRY_TAG", "TAG"),
    *("PYTHONDONTWRITEBYTECODE", "HTTPS_PROXY", "NO_PROXY"),
}
"""Read by compose and the shell, by Python and by the HTTP client."""
OF_THE_COLLECTOR = {
    *("CONSENTOS_TELEMETRY_TAG", "COLLECTOR_NETWORK", "FORWARDED_ALLOW_IPS"),
    *("POSTGRES_DB", "POSTGRES_PASSWORD", "POSTGRES_USER"),
}
"""Read by compose, by uvicorn and by the image of Postgres."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_variable_that_a_file_sets_is_one_that_is_read(path: Path) -> None:
    set_there = set(re.findall(r"(?m)^[ #-]*(?:ENV )?([A-Z][A-Z0-9_]+)[=:]", path.read_text()))
    of_the_collector = path.is_relative_to(generate.COLLECTOR)
    settings, others = (
        (CollectorSettings, OF_THE_COLLECTOR) if of_the_collector else (Settings, ELSEWHERE)
    )
    assert set_there <= others | {name.upper() for name in settings.model_fields}


@pytest.mark.parametrize("path", [*FILES, PAGE], ids=lambda path: path.name)
def test_no_file_holds_a_password(path: Path) -> None:
    assert set(re.findall(r"://\w+:([^@\s]+)@", path.read_text())) <= {"…"}


@pytest.mark.parametrize("name", [*sorted(OWN), *re.findall(r"--values (\S+)", PAGE.read_text())])
def test_git_ignores_what_an_operator_writes(name: str) -> None:
    assert name in (ROOT / ".gitignore").read_text().splitlines()


def test_the_page_makes_every_file_with_a_password_readable_by_its_owner_alone() -> None:
    page = PAGE.read_text()
    made = dict(re.findall(r"install -m 0600 (\S+) +(\S+)", page))
    assert {"env.example": ".env", "admin.env.example": "admin.env"}.items() <= made.items()
    assert {"deploy/systemd/env.example", "deploy/systemd/admin.example"} <= made.keys()
    assert made["deploy/honcho/env.example"] == ".env"


@pytest.mark.parametrize("page", [PAGE, ROOT / "README.md"], ids=lambda path: path.name)
def test_a_page_installs_the_honcho_that_the_tests_use(page: Path) -> None:
    (locked,) = re.findall(r"(?m)^honcho==(\S+)", (ROOT / "requirements/dev.txt").read_text())
    named = re.findall(r"pip install '?(honcho[^'\s]*)", page.read_text())
    assert {name.replace("[export]", "") for name in named} == {f"honcho=={locked}"}


# The operator's page


def shell_lines() -> list[str]:
    """Return the page's commands, each as one line."""
    blocks = re.findall(r"(?ms)^ *```bash\n(.*?)^ *```", PAGE.read_text())
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [each for each in joined.splitlines() if each.strip()]


def understood(words: list[str]) -> str:
    """Have the command line parse `python -m app …` without doing it; return the command's name."""
    group = typer.main.get_group(cli)
    for command in group.commands.values():
        command.callback = lambda **_: None
    assert words[:3] == ["python", "-m", "app"]
    group.main(words[3:], standalone_mode=False)
    return words[3]


def test_what_runs_on_heroku_and_dokku_is_a_process_of_the_procfile() -> None:
    scaled = re.findall(r"ps:scale (?:consentos-telemetry )?(\w+)=", PAGE.read_text())
    assert set(scaled) == {"solo"}
