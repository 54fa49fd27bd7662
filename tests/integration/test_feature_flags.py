"""Each flag of a heartbeat comes from its own variable."""

import pytest

from app import payload, report
from app.pipeline import Pipeline
from app.settings import Settings

UNSET = {
    "geoip_header_configured": False,
    "geoip_maxmind_configured": False,
    "rate_limit_enabled": True,
    "compliance_ee": False,
}


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("variable", "value", "changed"),
    [
        ("GEOIP_COUNTRY_HEADER", "CF-IPCountry", {"geoip_header_configured": True}),
        ("GEOIP_MAXMIND_DB_PATH", "/srv/geo.mmdb", {"geoip_maxmind_configured": True}),
        ("RATE_LIMIT_ENABLED", "false", {"rate_limit_enabled": False}),
        ("CONSENTOS_EDITION", "ee", {"compliance_ee": True}),
        ("GEOIP_COUNTRY_HEADER", "", {}),
    ],
)
def test_a_variable_changes_its_own_flag_and_no_other(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, changed: dict[str, bool]
) -> None:
    monkeypatch.setenv(variable, value)
    body = report.preview(Pipeline(Settings.load())).body
    flat = payload.flat(body)
    flags = {name: flat[f"features.{name}"] for name in UNSET}
    assert flags == {**UNSET, **changed}
