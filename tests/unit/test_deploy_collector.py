"""What runs a collector runs its Procfile's lines and believes its proxy alone."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from app import __version__
from app.collector import connections, intake
from app.collector.connections import MAX_HEAD_BYTES, Stage
from app.settings.collector import CollectorSettings
from deploy import generate
from tests.support.processes import ROOT, line
from tests.unit.places import containers, of_a_unit

DEPLOY = generate.COLLECTOR
CHART = DEPLOY / "helm"
EXAMPLE = DEPLOY / "env.example"
PAGE = (ROOT / "docs" / "collector.md").read_text()
CHECK = ["python", "-m", "app.collector", "check"]
PRESENT = {"FORWARDED_ALLOW_IPS": "10.42.0.0/16"}


def procfile(name: str) -> list[str]:
    return shlex.split(line(name, "Procfile.collector").removeprefix("exec "))


def test_the_example_names_every_setting_but_the_port() -> None:
    named = set(re.findall(r"(?m)^#?([A-Z_]+)=", EXAMPLE.read_text()))
    assert {name.upper() for name in CollectorSettings.model_fields} - named == {"PORT"}
    assert "FORWARDED_ALLOW_IPS" in named


@pytest.mark.parametrize("directory", ["tls", "acme"])
def test_git_ignores_the_certificates_of_an_operator(directory: str) -> None:
    assert f"deploy/collector/{directory}/" in (ROOT / ".gitignore").read_text().splitlines()


# docker compose


def compose(**variables: str) -> dict[str, Any]:
    """Return the compose file with these variables, and the defaults of all others."""
    text = (DEPLOY / "compose.yaml").read_text()
    for name, default in re.findall(r"\$\{([A-Z_]+):[-?]([^}]*)\}", text):
        text = re.sub(rf"\$\{{{name}:[^}}]*\}}", variables.get(name, default), text)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@pytest.fixture
def services() -> dict[str, Any]:
    found: dict[str, Any] = compose()["services"]
    return found


def address(service: Mapping[str, Any]) -> str:
    return str(service["networks"]["inside"]["ipv4_address"])


WEB = ("web-1", "web-2")


class TestCompose:
    def test_is_what_the_compose_specification_allows(self) -> None:
        check = [sys.executable, "-m", "check_jsonschema"]
        checked = subprocess.run(
            [*check, "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert checked.returncode == 0, checked.stdout

    def test_starts_the_web_processes_after_the_migration(self, services: dict[str, Any]) -> None:
        assert services["release"]["command"] == procfile("release")
        assert services["release"]["restart"] == "no"
        assert services["release"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
        for name in WEB:
            assert services[name]["command"] == procfile("web")
            released = {"release": {"condition": "service_completed_successfully"}}
            assert services[name]["depends_on"] == released

    def test_gives_the_operators_file_to_each_process_and_the_proxy_as_the_one_to_believe(
        self, tmp_path: Path
    ) -> None:
        there = tmp_path / "deploy" / "collector"
        there.mkdir(parents=True)
        shutil.copy(DEPLOY / "compose.yaml", there)
        shutil.copy(DEPLOY.parent / "Dockerfile", there.parent)
        url = "postgresql://collector:secret@postgres:5432/collector"
        (there / ".env").write_text(
            EXAMPLE.read_text().replace("PASSWORD=", "PASSWORD=secret")
            + f"COLLECTOR_DATABASE_URL={url}\nCOLLECTOR_NETWORK=10.9.8\nCOLLECTOR_CLIENT_RATE=7\n"
        )
        started = dict(containers(there))
        assert {*WEB, "release", "check", "proxy", "postgres"} == started.keys()
        for name in WEB:
            environment, command = started[name]
            assert command == procfile("web")
            assert environment["COLLECTOR_DATABASE_URL"] == url
            assert environment["COLLECTOR_CLIENT_RATE"] == "7"
            assert environment["FORWARDED_ALLOW_IPS"] == "10.9.8.2"
            assert "PORT" not in environment
        assert started["postgres"][0]["POSTGRES_PASSWORD"] == "secret"  # noqa: S105 - the test's
        assert "COLLECTOR_DATABASE_URL" not in {**started["proxy"][0], **started["postgres"][0]}

    @pytest.mark.parametrize("prefix", ["10.203.83", "192.168.77"])
    def test_believes_the_proxys_address_and_no_other(self, prefix: str) -> None:
        found = compose(COLLECTOR_NETWORK=prefix)
        services = found["services"]
        for name in WEB:
            assert services[name]["environment"] == {
                "FORWARDED_ALLOW_IPS": address(services["proxy"])
            }
        (inside,) = found["networks"]["inside"]["ipam"]["config"]
        for name in (*WEB, "proxy"):
            assert ip_address(address(services[name])) in ip_network(inside["subnet"])
        hosts = [f"{name}:{address(services[name])}" for name in WEB]
        assert services["proxy"]["extra_hosts"] == hosts
        assert ip_network(inside["subnet"]).is_private

    def test_lets_nobody_in_but_through_the_proxy(self, services: dict[str, Any]) -> None:
        assert [name for name, each in services.items() if "ports" in each] == ["proxy"]
        assert services["proxy"]["ports"] == ["0.0.0.0:443:443", "0.0.0.0:80:80"]
        assert compose()["networks"]["inside"]["internal"] is True
        assert [name for name, each in services.items() if "outside" in each["networks"]] == [
            "proxy"
        ]

    def test_asks_a_web_process_only_whether_it_lives(self, services: dict[str, Any]) -> None:
        for name in WEB:
            (_, python, option, code) = services[name]["healthcheck"]["test"]
            assert (python, option) == ("python", "-c")
            assert re.findall(r"127\.0\.0\.1:8000(/\w+)", code) == ["/healthz"]
            compile(code, name, "exec")

    def test_has_check_as_the_health_of_a_container_on_which_nothing_depends(
        self, services: dict[str, Any]
    ) -> None:
        assert services["check"]["healthcheck"]["test"] == ["CMD", *CHECK]
        assert not [
            name for name, each in services.items() if "check" in each.get("depends_on", {})
        ]

    def test_leaves_a_container_nothing_that_it_does_not_need(
        self, services: dict[str, Any]
    ) -> None:
        for name in (*WEB, "release", "check", "proxy"):
            assert services[name]["read_only"], name
            assert services[name]["cap_drop"] == ["ALL"]
            assert services[name]["security_opt"] == ["no-new-privileges:true"]
            assert services[name]["mem_limit"]
            assert {"privileged", "cap_add", "network_mode"}.isdisjoint(services[name])
        user, _ = services["proxy"]["user"].split(":")
        assert int(user) > 0

    def test_keeps_the_data_in_a_volume_and_pins_every_image(
        self, services: dict[str, Any]
    ) -> None:
        assert services["postgres"]["volumes"] == ["data:/var/lib/postgresql/data"]
        images = {name: each["image"] for name, each in services.items()}
        assert {images.pop("proxy"), images.pop("postgres")} == {"nginx:1.28.0", "postgres:17.6"}
        assert set(images.values()) == {f"consentos-telemetry:{__version__}"}
        for name in WEB:
            assert services[name]["build"]["dockerfile"] == "deploy/Dockerfile"
            assert (DEPLOY / services[name]["build"]["context"]).resolve() == ROOT


# The proxy


def directives() -> dict[str, list[str]]:
    """Return what nginx.conf sets, by the name of each directive."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(
        r"(?m)^ *([a-z_]+) ([^;{]+);", (DEPLOY / "nginx.conf").read_text()
    ):
        found.setdefault(name, []).append(value)
    return found


class TestTheProxy:
    def test_replaces_what_a_client_says_about_its_address(self) -> None:
        forwarded = [
            each for each in directives()["proxy_set_header"] if each.startswith("X-Forwarded-For")
        ]
        assert forwarded == ["X-Forwarded-For $remote_addr"]
        assert "real_ip_header" not in directives()

    def test_logs_no_client(self) -> None:
        assert directives()["access_log"] == ["off"]
        assert directives()["error_log"] == ["stderr emerg"]

    def test_bounds_the_time_and_the_size_of_a_request(self) -> None:
        found = directives()
        assert found["client_header_timeout"] == [f"{connections.SECONDS[Stage.HEAD]:g}s"]
        (buffers,) = found["large_client_header_buffers"]
        ((count, size),) = re.findall(r"^(\d+) (\d+)k$", buffers)
        assert int(count) * int(size) * 1024 == MAX_HEAD_BYTES
        for name in ("client_body_timeout", "send_timeout", "keepalive_timeout"):
            assert int(found[name][0].removesuffix("s")) <= 15

    def test_leaves_it_to_the_collector_to_refuse_and_count_what_is_too_large(self) -> None:
        (most,) = directives()["client_max_body_size"]
        assert int(most.removesuffix("k")) * 1024 > intake.MAX_BODY_BYTES
        # In memory: no body is written to a file.
        assert directives()["client_body_buffer_size"] == [most]
        assert directives()["proxy_max_temp_file_size"] == ["0"]

    def test_asks_each_web_process_of_compose_and_gives_a_connection_up_before_they_do(
        self,
    ) -> None:
        servers = [each.split()[0] for each in directives()["server"]]
        assert servers == [f"{name}:{CollectorSettings().port}" for name in WEB]
        _, kept = directives()["keepalive_timeout"]
        assert int(kept.removesuffix("s")) < connections.SECONDS[Stage.HEAD]

    def test_is_made_one_for_systemd_by_the_line_of_the_page(self) -> None:
        (command,) = re.findall(r"(?m)^(sed .* deploy/collector/nginx\.conf) > ", PAGE)
        made = subprocess.run(
            ["sh", "-c", command], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
        ).stdout
        assert re.findall(r"server (\S+) max_fails", made) == ["127.0.0.1:8001", "127.0.0.1:8002"]
        assert {"web@8001", "web@8002"} <= set(re.findall(r"web@\d+", PAGE))


# Kubernetes


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    peers = [{"podSelector": {"matchLabels": {"app": "ingress"}}}]
    ingress = {"host": "telemetry.example.org"}
    return generate.rendered(CHART, env=PRESENT, ingress=ingress, **{"from": peers})


def web(objects: Mapping[str, Any]) -> dict[str, Any]:
    (found,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    return dict(found)


def pods(objects: Mapping[str, Any]) -> list[dict[str, Any]]:
    templates = (
        objects["Deployment"]["spec"],
        objects["Job"]["spec"],
        objects["CronJob"]["spec"]["jobTemplate"]["spec"],
    )
    return [each["template"]["spec"] for each in templates]


class TestKubernetes:
    def test_has_a_chart_in_which_helm_finds_nothing_wrong(self) -> None:
        report = helm_python.lint(CHART, strict=True)
        assert report["errors"] == []
        assert {each["error"] for each in report["messages"]} == {"icon is recommended"}

    def test_shares_what_it_has_in_common_with_the_senders_chart(self) -> None:
        for name in ("_helpers.tpl", "configmap.yaml"):
            file = CHART / "templates" / name
            assert file.resolve() == generate.CHART / "templates" / name

    def test_says_what_is_missing_where_nobody_is_named_as_proxy(self) -> None:
        with pytest.raises(helm_python.HelmRenderError, match=r"Set env\.FORWARDED_ALLOW_IPS to"):
            generate.rendered(CHART)

    @pytest.mark.parametrize("value", ["*", "10.0.0.0/8,*", 10, None])
    def test_refuses_to_believe_everybody(self, value: object) -> None:
        with pytest.raises(helm_python.HelmValuesError, match="FORWARDED_ALLOW_IPS"):
            generate.rendered(CHART, env={"FORWARDED_ALLOW_IPS": value})

    @pytest.mark.parametrize("name", ["COLLECTOR_DATABASE_URL", "COLLECTOR_TOKEN", "PORT"])
    def test_refuses_a_secret_in_the_configmap_and_another_port(self, name: str) -> None:
        with pytest.raises(helm_python.HelmValuesError, match=name):
            generate.rendered(CHART, env={**PRESENT, name: "x"})

    def test_refuses_what_it_does_not_know_and_a_single_replica(self) -> None:
        unknown: tuple[dict[str, Any], ...] = ({"replica": 3}, {"ingress": {"hots": "x"}})
        for values in unknown:
            with pytest.raises(helm_python.HelmValuesError, match="not allowed"):
                generate.rendered(CHART, env=PRESENT, **values)
        with pytest.raises(helm_python.HelmValuesError, match="replicas"):
            generate.rendered(CHART, env=PRESENT, replicas=1)

    def test_names_only_real_settings(self) -> None:
        named = re.findall(r"(?m)^ +(?:# )?([A-Z_]{4,}):", (CHART / "values.yaml").read_text())
        settings = {name.upper() for name in CollectorSettings.model_fields}
        assert set(named) <= settings | {"FORWARDED_ALLOW_IPS"}

    def test_runs_the_procfiles_lines_and_check(self, objects: dict[str, Any]) -> None:
        commands = [pod["containers"][0]["command"] for pod in pods(objects)]
        assert commands == [procfile("web"), procfile("release"), CHECK]

    def test_migrates_before_the_pods_of_an_upgrade_start(self, objects: dict[str, Any]) -> None:
        hook = objects["Job"]["metadata"]["annotations"]["helm.sh/hook"]
        assert hook == "pre-install,pre-upgrade"
        # Before the first installation there is no ConfigMap.
        (source,) = pods(objects)[1]["containers"][0]["envFrom"]
        assert source == {"secretRef": {"name": "consentos-collector"}}

    def test_replaces_one_pod_after_the_other_and_never_has_fewer_than_before(
        self, objects: dict[str, Any]
    ) -> None:
        spec = objects["Deployment"]["spec"]
        assert spec["replicas"] >= 2
        assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        assert objects["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1

    def test_restarts_only_a_process_that_is_dead_and_routes_to_one_that_is_not_ready(
        self, objects: dict[str, Any]
    ) -> None:
        probes = {
            name: each["httpGet"]["path"]
            for name, each in web(objects).items()
            if name.endswith("Probe")
        }
        assert probes == {"livenessProbe": "/healthz", "readinessProbe": "/readyz"}
        assert objects["Service"]["spec"]["publishNotReadyAddresses"] is True

    def test_selects_the_web_pods_and_not_those_of_the_jobs(self, objects: dict[str, Any]) -> None:
        selector = objects["Service"]["spec"]["selector"]
        labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()
        assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == selector
        assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == selector
        assert objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == selector
        for each in (objects["Job"]["spec"], objects["CronJob"]["spec"]["jobTemplate"]["spec"]):
            assert not selector.items() <= each["template"]["metadata"]["labels"].items()

    def test_leads_from_the_host_to_the_port_of_the_web_process(
        self, objects: dict[str, Any]
    ) -> None:
        (rule,) = objects["Ingress"]["spec"]["rules"]
        (path,) = rule["http"]["paths"]
        service = objects["Service"]
        (port,) = service["spec"]["ports"]
        assert path["backend"]["service"] == {
            "name": service["metadata"]["name"],
            "port": {"name": port["name"]},
        }
        (listening,) = web(objects)["ports"]
        assert (port["targetPort"], listening["containerPort"]) == (
            listening["name"],
            CollectorSettings().port,
        )
        assert {"Ingress", "NetworkPolicy"}.isdisjoint(generate.rendered(CHART, env=PRESENT))

    def test_opens_the_metrics_to_the_pods_network_only_where_they_are_on(self) -> None:
        metrics = {**PRESENT, "COLLECTOR_METRICS_PORT": 9100}
        command = web(generate.rendered(CHART, env=metrics))["command"]
        assert command == [*procfile("web"), "--metrics-host", "0.0.0.0"]  # noqa: S104 - the pod's

    def test_keeps_to_the_restricted_pod_security_standard(self, objects: dict[str, Any]) -> None:
        for pod in pods(objects):
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["runAsUser"] > 0
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert pod["automountServiceAccountToken"] is False
            assert pod["enableServiceLinks"] is False
            (container,) = pod["containers"]
            assert container["image"] == f"consentos-telemetry:{__version__}"
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]

    def test_asks_check_once_an_hour_and_a_finding_is_a_failed_job(
        self, objects: dict[str, Any]
    ) -> None:
        spec = objects["CronJob"]["spec"]
        assert re.fullmatch(r"\d+ \* \* \* \*", spec["schedule"])
        assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0
        assert pods(objects)[2]["restartPolicy"] == "Never"

    def test_takes_the_values_of_the_page(self) -> None:
        (example,) = re.findall(r"(?ms)^```yaml\n(env:.*?)^```", PAGE)
        found = generate.rendered(CHART, **helm_python.values_from_yaml(example))
        assert {"Ingress", "NetworkPolicy"} <= found.keys()
        allowed = found["ConfigMap"]["data"]["FORWARDED_ALLOW_IPS"]
        assert ip_network(allowed).is_private


# systemd


def unit(name: str) -> dict[str, list[str]]:
    """Return the settings of a unit, by name."""
    found: dict[str, list[str]] = {}
    for each in (DEPLOY / "systemd" / name).read_text().splitlines():
        key, equals, value = each.partition("=")
        if equals and not key.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def started(name: str) -> list[str]:
    """Return the words of a unit's command, from `python` on."""
    (command,) = unit(name)["ExecStart"]
    before, _, words = command.partition("/opt/consentos-telemetry/.venv/bin/python")
    assert before in {"", "/usr/bin/env PORT=%i "}
    return ["python", *words.split()]


class TestSystemd:
    def test_runs_the_procfiles_lines_and_check(self) -> None:
        loopback = ["--host", "127.0.0.1"]
        assert started("consentos-collector-web@.service") == [*procfile("web"), *loopback]
        assert started("consentos-collector-release.service") == procfile("release")
        assert started("consentos-collector-check.service") == CHECK

    def test_gives_each_process_the_port_of_its_name_whatever_the_file_says(self) -> None:
        (command,) = unit("consentos-collector-web@.service")["ExecStart"]
        assert command.startswith("/usr/bin/env PORT=%i ")

    def test_restarts_what_ends_and_makes_no_web_process_wait_for_a_migration_that_fails(
        self,
    ) -> None:
        found = unit("consentos-collector-web@.service")
        assert found["Restart"] == ["always"]
        assert found["Wants"] == found["After"] == ["consentos-collector-release.service"]
        assert "Requires" not in found
        assert unit("consentos-collector-release.service")["Type"] == ["oneshot"]

    def test_asks_check_once_an_hour_and_nothing_depends_on_it(self) -> None:
        assert unit("consentos-collector-check.timer")["OnCalendar"] == ["hourly"]
        for file in (DEPLOY / "systemd").glob("*.service"):
            found = unit(file.name)
            wanted = {*found.get("Requires", []), *found.get("BindsTo", [])}
            assert not wanted
            assert "OnFailure" not in found

    def test_is_hardened_as_the_sender_is(self) -> None:
        drop_in = (DEPLOY / "systemd" / "consentos-collector.conf").read_text()
        of_the_sender = DEPLOY.parent / "systemd" / "consentos-telemetry.conf"
        _, _, hardened = of_the_sender.read_text().partition("\n\nNoNewPrivileges")
        assert hardened
        assert drop_in.endswith(f"NoNewPrivileges{hardened}")
        assert unit("consentos-collector.conf")["DynamicUser"] == ["yes"]

    def test_has_one_drop_in_for_every_unit_at_the_place_of_the_page(self) -> None:
        # systemd has a name that ends in a hyphen be about every unit that begins with it.
        place = "/etc/systemd/system/consentos-collector-.service.d"
        drop_in = (DEPLOY / "systemd" / "consentos-collector.conf").read_text()
        assert f"{place}/\n" in drop_in
        assert f"-t {place} deploy/collector/systemd/consentos-collector.conf" in PAGE
        for file in (DEPLOY / "systemd").glob("*.service"):
            assert file.name.startswith("consentos-collector-")
            assert "EnvironmentFile" not in unit(file.name)

    def test_believes_the_proxy_of_its_machine_by_default(self) -> None:
        variables = of_a_unit(EXAMPLE.read_text())
        assert not {"FORWARDED_ALLOW_IPS", "PORT"} & variables.keys()
        assert "#FORWARDED_ALLOW_IPS=127.0.0.1\n" in EXAMPLE.read_text()
