"""A variable that is set in its documented place reaches the process, and off is off."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import helm_python
import pytest
import yaml

from deploy import generate
from tests.support.processes import ROOT
from tests.unit.places import (
    ADMIN,
    DEPLOY,
    FILLED_IN,
    PLACES,
    SECRETS,
    SWITCH,
    Compose,
    Given,
    Helm,
    Honcho,
    Kustomize,
    Override,
    Place,
    Systemd,
    of_a_unit,
    reason,
    warnings,
)


def documented() -> list[str]:
    """Return the variables of the operator's page."""
    _, _, after = (ROOT / "docs" / "operate.md").read_text().partition("\n## Settings\n")
    table, _, _ = after.partition("\n## ")
    cells = [row.split(" | ")[0] for row in table.splitlines() if row.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([A-Z_]+)`", cell)]


MISSPELT = "TELEMETRY_ENDPIONT"
LIBRARIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
NAMES = (*documented(), MISSPELT, *LIBRARIES)


def value(name: str) -> str:
    """Return a value of the variable's own, with what a URL may hold."""
    return f"http://{name.lower()}.example:3128/a/b?c=d&e=%2C"


@pytest.fixture(scope="module", params=PLACES, ids=lambda place: place.name)
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.param
    return found


@pytest.fixture(scope="module")
def given(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Given:
    """What the processes get when every variable is set."""
    everything = {name: place.as_written(name, value(name)) for name in NAMES}
    return place.given(tmp_path_factory.mktemp("place"), everything)


def test_the_operators_page_names_the_variables() -> None:
    assert {SWITCH, "DO_NOT_TRACK", "ENVIRONMENT", ADMIN, "CONSENTOS_EDITION"} <= {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_variable_reaches_the_process(name: str, place: Place, given: Given) -> None:
    if name == ADMIN:
        # An override is of the service that sends.
        if not isinstance(place, Override):
            assert given.owner[name] == value(name)
    else:
        assert given.sender[name] == value(name)


@pytest.mark.parametrize(
    "place", [Compose(), Helm(), Kustomize(), Systemd(), Honcho()], ids=lambda p: p.name
)
def test_the_owners_url_does_not_reach_the_process_that_sends(place: Place, tmp_path: Path) -> None:
    given = place.given(tmp_path, {})
    assert ADMIN not in given.sender
    assert given.owner[ADMIN] == FILLED_IN[ADMIN]


def test_telemetry_is_on_once_its_operator_has_filled_in_the_example(
    place: Place, tmp_path: Path
) -> None:
    given = place.given(tmp_path, {})
    assert reason(given.sender) is None
    assert reason(given.owner) is None
    assert [each for each in warnings(given.sender) if not each.startswith("APP_VERSION")] == []


def test_the_example_says_what_it_is_and_leaves_the_edition_to_nobody(
    place: Place, tmp_path: Path
) -> None:
    sender = place.given(tmp_path, {}).sender
    assert sender["CONSENTOS_EDITION"] == "ce"
    kinds = {"compose override": "docker-compose", "compose": "docker-compose"}
    kinds |= {"kustomize": "kubernetes", "honcho": "bare-metal"}
    assert sender["CONSENTOS_DEPLOYMENT"] == kinds.get(place.name, place.name)
    assert sender["APP_VERSION"] == FILLED_IN["APP_VERSION"]


OFF: tuple[Mapping[str, str], ...] = (
    *({SWITCH: word} for word in ("false", "0", "no", "off", "False", "OFF", "flase", "")),
    *({"DO_NOT_TRACK": word} for word in ("1", "true", "yes")),
    *({"ENVIRONMENT": word} for word in ("development", "Test", "")),
    {MISSPELT: "https://collector.example/v1/heartbeat"},
    {"TELEMETRY_ENABELD": "true"},
    {"TELEMETRY_TIMEOUT_SECONDS": "ten"},
)


@pytest.mark.parametrize("off", OFF, ids=lambda off: "=".join(*off.items()))
def test_off_is_off_in_every_form(off: Mapping[str, str], place: Place, tmp_path: Path) -> None:
    forms = place.forms if off.get(SWITCH) in {"false", ""} else place.forms[:1]
    for form in forms:
        if place.empty_is_unset and "" in [form % word for word in off.values()]:
            continue  # the page warns of it
        written = {name: form % word for name, word in off.items()}
        directory = tmp_path / str(place.forms.index(form))
        directory.mkdir()
        try:
            sender = place.given(directory, written).sender
        except helm_python.HelmValuesError:
            # Helm takes an empty value for null, which the chart refuses.
            assert [*written.values()] == [""]
        else:
            assert reason(sender), (written, {name: sender.get(name) for name in off})


def test_the_pages_warn_of_a_name_without_a_value() -> None:
    for page in ("telemetry.md", "operate.md"):
        words = " ".join((ROOT / "docs" / page).read_text().split())
        assert "honcho ignores `TELEMETRY_ENABLED=`" in words
        assert "for a bare `TELEMETRY_ENABLED` or `TELEMETRY_ENABLED:`, and unset means on" in words


class TestCompose:
    def test_no_variable_of_the_shell_turns_it_on(self, tmp_path: Path) -> None:
        compose = Compose(around={SWITCH: "true"})
        assert reason(compose.given(tmp_path, {SWITCH: "false"}).sender)

    def test_the_example_of_the_page_wins_over_the_file(self, tmp_path: Path) -> None:
        page = (ROOT / "docs" / "telemetry.md").read_text()
        _, _, section = page.partition("**docker compose**")
        (example, *_) = re.findall(r"(?ms)^```yaml\n(.*?)^```", section)
        assert "services:" in example
        sender = Compose().given(tmp_path, {SWITCH: "true"}, example).sender
        assert sender[SWITCH] == "false"
        assert reason(sender)


class TestHelm:
    @pytest.mark.parametrize(
        "name", [name for name in (*NAMES, "ANOTHER") if name not in {*SECRETS, ADMIN}]
    )
    def test_null_is_refused(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(helm_python.HelmValuesError, match=name):
            Helm().given(tmp_path, {name: "null"})

    def test_a_bare_word_arrives_as_the_word_that_telemetry_reads(self, tmp_path: Path) -> None:
        for word in ("false", "no", "off", "0"):
            arrived = Helm().given(tmp_path, {SWITCH: word}).sender[SWITCH]
            assert arrived in {"false", "0"}


def test_a_unit_reads_its_file_as_systemd_does() -> None:
    lines = (
        "# A comment",
        "; another",
        "PLAIN=a b  ",
        'QUOTED="a b" ',
        "SINGLE='a \"b\"'",
        'INSIDE=a"b',
        "HASH=a # b",
        "EMPTY=",
        "no equals sign",
        "ESCAPED=a\\ b",
    )
    assert of_a_unit("\n".join(lines)) == {
        "PLAIN": "a b",
        "QUOTED": "a b",
        "SINGLE": 'a "b"',
        "INSIDE": 'a"b',
        "HASH": "a # b",
        "EMPTY": "",
        "ESCAPED": "a b",
    }


def examples(page: str, language: str) -> list[str]:
    """Return the blocks of a page in a language, without their indentation."""
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


class TestThePages:
    def test_turn_the_chart_off_in_its_own_values(self) -> None:
        (example,) = [each for each in examples("telemetry.md", "yaml") if each.startswith("env:")]
        data = generate.rendered(**helm_python.values_from_yaml(example))["ConfigMap"]["data"]
        assert data[SWITCH] == "false"
        assert reason({**FILLED_IN, **data}) == "TELEMETRY_ENABLED is false"

    def test_install_the_chart_with_values_that_it_takes_and_that_are_on(self) -> None:
        (example,) = [each for each in examples("operate.md", "yaml") if "repository" in each]
        data = generate.rendered(**helm_python.values_from_yaml(example))["ConfigMap"]["data"]
        assert reason({**FILLED_IN, **data}) is None
        assert {"APP_VERSION", "CONSENTOS_EDITION"} <= {*data}

    def test_turn_the_kustomization_off_by_a_literal_that_it_has(self) -> None:
        (example,) = [each for each in examples("telemetry.md", "yaml") if "literals" in each]
        (generator,) = yaml.safe_load(example)["configMapGenerator"]
        shipped = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
        assert generator["name"] == shipped["configMapGenerator"][0]["name"]
        assert generator["literals"] == ["TELEMETRY_ENABLED=false"]
        assert "TELEMETRY_ENABLED=true" in shipped["configMapGenerator"][0]["literals"]

    def test_set_on_heroku_and_dokku_what_a_file_sets_elsewhere(self) -> None:
        commands = "\n".join(examples("operate.md", "bash")).replace("\\\n", " ")
        installs = [
            line for line in commands.splitlines() if "config:set" in line and SWITCH not in line
        ]
        assert [line.split()[0] for line in installs] == ["heroku", "dokku"]
        for line in installs:
            variables = dict(re.findall(r"\b([A-Z_]+)=(\S+)", line))
            assert variables.keys() <= {*NAMES}
            assert variables["CONSENTOS_DEPLOYMENT"] == line.split()[0]
            assert reason({**FILLED_IN, **variables}) is None
            assert {"APP_VERSION", "CONSENTOS_EDITION", "ENVIRONMENT"} <= variables.keys()

    @pytest.mark.parametrize("page", ["operate.md", "telemetry.md", "../README.md"])
    def test_name_no_version_of_consentos_below_the_first_that_works(self, page: str) -> None:
        text = (ROOT / "docs" / page).read_text()
        assert not re.findall(r"APP_VERSION[=:] *\"?v?0\.[01]\.", text)

    @pytest.mark.parametrize(
        "image", ["registry.example:5000/consentos/api:v0.2.0", "consentos-api:v0.2.0"]
    )
    def test_take_the_version_from_consentos_own_container(
        self, image: str, tmp_path: Path
    ) -> None:
        found = [
            lines
            for block in examples("operate.md", "bash")
            for lines in re.findall(r"(?m)^TAG=.*\nsed -i .*$", block)
        ]
        assert len(found) == 2
        stub = tmp_path / "docker"
        stub.write_text(f"#!/bin/sh\necho {image}\n")
        stub.chmod(0o755)
        for lines in found:
            shutil.copy(DEPLOY / "env.example", tmp_path / ".env")
            subprocess.run(
                ["sh", "-ec", lines],
                cwd=tmp_path,
                env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
                check=True,
            )
            assert "\nAPP_VERSION=v0.2.0\n" in (tmp_path / ".env").read_text()
