"""Off means off: the gate, and what is reported about a value without repeating it."""

import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from app.payload import Deployment, Version
from app.settings import Enabled, Settings
from tests.unit.environment import MARKER, load, reason, reported

SWITCHES = (
    "DO_NOT_TRACK",
    "TELEMETRY_ENABLED",
    "TELEMETRY_ENDPOINT",
    "TELEMETRY_TIMEOUT_SECONDS",
    "TELEMETRY_SPREAD_SECONDS",
    "TELEMETRY_RETENTION_DAYS",
)


def test_telemetry_is_on_in_production_with_nothing_else_set() -> None:
    assert load().gate == Enabled()
    assert load().warnings == ()


@pytest.mark.parametrize("value", ["true", "1", "yes", "on", "t", "y", "True", "TRUE", "ON", "Y"])
def test_telemetry_enabled_is_on_with_any_word_for_true_in_any_case(value: str) -> None:
    assert reason(load(TELEMETRY_ENABLED=value)) is None


@pytest.mark.parametrize("value", ["false", "0", "no", "off", "f", "n", "False", "OFF", "F", "N"])
def test_telemetry_enabled_is_off_with_any_word_for_false_in_any_case(value: str) -> None:
    assert reason(load(TELEMETRY_ENABLED=value)) == "TELEMETRY_ENABLED is false"


@pytest.mark.parametrize(
    "value", ["", " ", "\t", " true", "true ", "2", "tr", "ye", "enable", "ture", '"true"']
)
def test_any_other_word_for_enabled_is_off(value: str) -> None:
    off = reason(load(TELEMETRY_ENABLED=value)) or ""
    assert off.startswith("TELEMETRY_ENABLED must be true or false")


@pytest.mark.parametrize("value", [None, "", "0", "false", "False", "FALSE"])
def test_do_not_track_leaves_telemetry_on_where_it_is_empty_or_denied(value: str | None) -> None:
    assert reason(load(DO_NOT_TRACK=value)) is None


@pytest.mark.parametrize("value", ["1", "true", "yes", "no", "off", "00", " ", "2", "please"])
def test_do_not_track_is_off_by_any_other_word(value: str) -> None:
    assert reason(load(DO_NOT_TRACK=value)) == "DO_NOT_TRACK is set"


@pytest.mark.parametrize(
    "value", ["", " ", "development", "dev", "local", "test", "Test", "DEVELOPMENT", " dev "]
)
def test_a_development_environment_is_off(value: str) -> None:
    assert reason(load(ENVIRONMENT=value)) == "ENVIRONMENT is empty or a development one"


def test_an_environment_that_is_not_set_is_development() -> None:
    assert reason(load(ENVIRONMENT=None)) == "ENVIRONMENT is not set, which means development"


@pytest.mark.parametrize(
    "value", ["production", "staging", "Production", "prod", "testing", "eu-1.prod_a", "2"]
)
def test_every_other_environment_is_on(value: str) -> None:
    assert reason(load(ENVIRONMENT=value)) is None


@pytest.mark.parametrize(
    "value",
    [
        *(f'"{MARKER}"', f"'{MARKER}'", f"{MARKER} # live", f"{MARKER} ", f" {MARKER}"),
        *(f"{MARKER}\n", f"{MARKER}\r", f"-{MARKER}", f".{MARKER}", f"{MARKER}=", f"é{MARKER}"),
        *(f'"dev{MARKER}', f"${{{MARKER}}}", "#", "\u0662"),
    ],
)
def test_an_environment_that_is_not_one_plain_word_is_off_and_is_not_repeated(value: str) -> None:
    settings = load(ENVIRONMENT=value)
    assert (reason(settings) or "").startswith("ENVIRONMENT must be one plain word")
    assert MARKER not in f"{settings.gate!r}{settings.warnings}"


@pytest.mark.parametrize("value", ['"production"', "production # live", "production "])
def test_quotes_a_comment_or_a_space_that_a_runner_left_around_production_is_off(
    value: str,
) -> None:
    assert reason(load(ENVIRONMENT=value))


def test_every_reason_for_off_is_given_at_once() -> None:
    settings = load(TELEMETRY_ENABLED="0", DO_NOT_TRACK="1", ENVIRONMENT="dev", TELEMETRY_X="")
    given = reason(settings) or ""
    for variable in ("TELEMETRY_ENABLED", "DO_NOT_TRACK", "ENVIRONMENT", "TELEMETRY_X"):
        assert variable in given


WRONG = [
    *(("TELEMETRY_ENABLED", MARKER), ("RATE_LIMIT_ENABLED", MARKER)),
    *(("TELEMETRY_TIMEOUT_SECONDS", value) for value in (MARKER, f"-{MARKER}", f"{MARKER}s")),
    *(("TELEMETRY_SPREAD_SECONDS", value) for value in (MARKER, f"-{MARKER}", f"1.{MARKER}")),
    *(("TELEMETRY_RETENTION_DAYS", value) for value in (MARKER * 2, f"-{MARKER}", f"{MARKER}d")),
    *(("TELEMETRY_RETENTION_DAYS", value) for value in (MARKER * 2000, f"{MARKER}\udcff")),
    ("TELEMETRY_ENDPOINT", f"ftp://{MARKER}/"),
    ("TELEMETRY_ENDPOINT", f"https://host:{MARKER}{MARKER}/"),
    ("TELEMETRY_ENDPOINT", f"https://user:{MARKER}@host/"),
]


@pytest.mark.parametrize(("variable", "value"), WRONG)
def test_a_value_that_cannot_be_parsed_is_off_and_is_not_repeated(
    variable: str, value: str
) -> None:
    settings = load(**{variable: value})
    assert (reason(settings) or "").startswith(f"{variable} ")
    assert MARKER not in reported(settings)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("TELEMETRY_TIMEOUT_SECONDS", value) for value in ("", "0", "60.1", "nan", "inf", "-1")),
        *(("TELEMETRY_SPREAD_SECONDS", value) for value in ("", "-1", "3601", "1.5", "nan")),
        *(("TELEMETRY_RETENTION_DAYS", value) for value in ("", "-1", "36501", "one")),
        ("RATE_LIMIT_ENABLED", ""),
    ],
)
def test_a_number_beyond_its_limits_is_off(variable: str, value: str) -> None:
    assert (reason(load(**{variable: value})) or "").startswith(f"{variable} must be ")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("TELEMETRY_TIMEOUT_SECONDS", value) for value in ("0.1", "60", "10")),
        *(("TELEMETRY_SPREAD_SECONDS", value) for value in ("0", "3600")),
        *(("TELEMETRY_RETENTION_DAYS", value) for value in ("0", "36500")),
    ],
)
def test_a_number_at_its_limit_is_on(variable: str, value: str) -> None:
    settings = load(**{variable: value})
    assert reason(settings) is None
    assert getattr(settings, variable.lower()) == float(value)


@pytest.mark.parametrize(("variable", "value"), WRONG)
def test_the_error_of_a_wrong_value_does_not_repeat_it_either(variable: str, value: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable, value)
        with pytest.raises(ValidationError) as error:
            Settings()
    assert MARKER not in f"{error.value} {error.value!r}"


def typos(name: str) -> list[str]:
    """Return every name that is one dropped, doubled, changed or swapped letter away."""
    places = range(len(name))
    dropped = [name[:i] + name[i + 1 :] for i in places]
    doubled = [name[: i + 1] + name[i:] for i in places]
    changed = [f"{name[:i]}X{name[i + 1 :]}" for i in places]
    swapped = [name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in places[:-1]]
    return sorted({*dropped, *doubled, *changed, *swapped} - {name})


@pytest.mark.parametrize("name", SWITCHES)
def test_a_name_one_letter_off_is_off_and_the_right_name_is_suggested(name: str) -> None:
    for typo in typos(name):
        for spelt in (typo, typo.lower()):
            settings = load(**{spelt: MARKER})
            assert reason(settings) == (
                f"{spelt} is not a telemetry variable (did you mean {name}?)"
            )
            assert MARKER not in reported(settings)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_name_in_lower_case_is_off_and_the_right_name_is_suggested(name: str) -> None:
    assert f"(did you mean {name}?)" in (reason(load(**{name.lower(): "1"})) or "")


def test_a_name_in_lower_case_is_never_read() -> None:
    settings = load(environment="dev", app_version="1.2.3", rate_limit_enabled="false")
    assert settings.model_dump() == load().model_dump()


@pytest.mark.parametrize("name", ["TELEMETRY_", "TELEMETRY_DISABLED", "telemetry_url"])
def test_any_other_name_of_telemetry_is_off(name: str) -> None:
    assert f"{name} is not a telemetry variable" in (reason(load(**{name: ""})) or "")


def test_a_name_is_shown_in_plain_letters_and_not_without_end() -> None:
    shown = reason(load(**{f"TELEMETRY_\n{'é' * 500}": "1"})) or ""
    assert shown.isprintable()
    assert len(shown) < 200


@pytest.mark.parametrize(
    "name",
    ["NEXT_TELEMETRY_DISABLED", "OTEL_SDK_DISABLED", "TRACK", "ENABLED", "COLLECTOR_TIMEOUT"],
)
def test_another_programs_variable_is_not_taken_for_a_misspelt_one(name: str) -> None:
    assert reason(load(**{name: "1"})) is None


@pytest.mark.parametrize(
    ("variable", "instead"),
    [
        ("CONSENTOS_DEPLOYMENT", "unknown"),
        ("CONSENTOS_EDITION", None),
        ("APP_VERSION", "0.0.0-dev"),
        ("LOG_LEVEL", "INFO"),
    ],
)
@pytest.mark.parametrize("value", ["", " ", f"{MARKER}!", f"{MARKER}\n", f"\u0662{MARKER}"])
def test_a_wrong_label_earns_a_warning_and_telemetry_stays_on(
    variable: str, instead: str | None, value: str
) -> None:
    settings = load(**{variable: value})
    assert reason(settings) is None
    assert getattr(settings, variable.lower()) == instead
    (warning,) = settings.warnings
    assert warning.startswith(f"{variable} must be ")
    assert MARKER not in reported(settings)


@pytest.mark.parametrize("value", ["ce", "ee", "CE", "Ee"])
def test_the_edition_given_is_the_edition(value: str) -> None:
    assert load(CONSENTOS_EDITION=value).edition == value.lower()


def test_the_edition_is_enterprise_where_a_package_ee_can_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load().edition == "ce"
    (tmp_path / "ee").mkdir()
    (tmp_path / "ee" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert load().edition == "ee"
    assert "ee" not in sys.modules


@pytest.mark.parametrize(
    ("value", "version"),
    [
        ("v0.2.0", "0.2.0"),
        ("0.2.0", "0.2.0"),
        ("v1.0.0-rc.1", "1.0.0-rc.1"),
        ("V0.2.0", "0.0.0-dev"),
        ("vv0.2.0", "0.0.0-dev"),
        ("v", "0.0.0-dev"),
        ("0.2", "0.0.0-dev"),
        ("", "0.0.0-dev"),
    ],
)
def test_a_version_is_sent_without_the_v_of_its_git_tag(value: str, version: str) -> None:
    settings = load(APP_VERSION=value)
    assert settings.app_version == version
    assert bool(settings.warnings) is (version == "0.0.0-dev")


def test_a_version_that_is_not_set_earns_a_warning_and_telemetry_stays_on() -> None:
    settings = load(APP_VERSION=None)
    assert settings.gate == Enabled()
    assert settings.app_version == "0.0.0-dev"
    (warning,) = settings.warnings
    assert warning.startswith("APP_VERSION is not set, so 0.0.0-dev is sent")


labels = st.from_regex(r"[\w.-]{0,34}\n?", fullmatch=True)
versions = st.from_regex(r"\d{1,6}\.\d{1,6}\.\d{1,6}(-(dev|rc))?(\.\d+)?\n?", fullmatch=True)


@given(labels, versions)
@example("a" * 32, "99999.0.1-rc.2")
@example("a-\u0662", "1.2.\u0662")
def test_whatever_is_accepted_as_a_label_or_a_version_fits_the_payload(
    deployment: str, version: str
) -> None:
    settings = load(CONSENTOS_DEPLOYMENT=deployment, APP_VERSION=version)
    TypeAdapter(Deployment).validate_python(settings.consentos_deployment)
    TypeAdapter(Version).validate_python(settings.app_version)


def test_no_env_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("TELEMETRY_ENABLED=false\nTELEMETRY_ENDPIONT=x\n")
    monkeypatch.chdir(tmp_path)
    assert load().gate == Enabled()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_settings_cannot_be_changed_once_they_are_read(name: str) -> None:
    settings = load()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, name, getattr(settings, name))
