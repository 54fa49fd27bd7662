"""The fleets that the collector's page is looked at with, from no install to 60,000.

In a test, ask the fixture ``collectors`` for the collector of one: ``collectors["80 versions"]``.
"""

from collections.abc import Iterable, Mapping

from app.collector.names import KNOWN, OTHER
from tests.browser.fleet import Fleet, Weights

LONG_VERSIONS = (
    *(f"0.10.0-beta.{number}" for number in range(1, 21)),
    *(f"12.345.{patch}-alpha.{number}" for patch in (676, 677) for number in range(10, 20)),
    *(f"12.345.678-rc.{number}" for number in range(12, 22)),
)
LONG_LABELS = (
    *(f"the-servers-of-a-big-agency-no-{number:x}" for number in range(10)),
    *(f"label{number:02}".ljust(32, "w") for number in range(50 - 11 - len(KNOWN["deployment"]))),
)
"""Labels as long as the payload allows: that a later release may list, as this one does not."""


def _falling(names: Iterable[str]) -> Weights:
    """Return weights for names: the first is the commonest, and the last one not too rare."""
    return {name: 1 / (number + 4) for number, name in enumerate(names)}


SCENARIOS: Mapping[str, Fleet] = {
    "none": Fleet(installs=0, days=0, versions=()),
    "3 installs": Fleet(installs=3, days=20),
    "7 installs": Fleet(installs=7, days=20),
    "60 installs": Fleet(installs=60),
    "600 installs": Fleet(installs=600),
    "60,000 installs": Fleet(installs=60_000),
    "one version": Fleet(installs=400, versions=("1.0.0",), every=1_000, unlisted=0),
    "80 versions": Fleet(
        installs=4_000,
        days=390,
        versions=[f"{major}.{minor}.0" for major in range(1, 9) for minor in range(10)],
        every=5,
        paces={200: 1},
    ),
    "long names": Fleet(
        installs=5_000,
        days=120,
        versions=LONG_VERSIONS,
        every=3,
        paces={60: 1},
        values={
            "platform": {"linux": 0.7, "darwin": 0.15, "win32": 0.1, OTHER: 0.05},
            "deployment": _falling([*KNOWN["deployment"], *LONG_LABELS, OTHER]),
            "python_version": _falling([*KNOWN["python_version"], OTHER]),
            "stack.postgres_version": _falling([*KNOWN["stack.postgres_version"], OTHER]),
        },
    ),
    "later schema": Fleet(
        installs=800,
        reported_since={
            "stack.postgres_version": "0.15.0",
            "counts.scans_last_24h": "0.16.0",
            "features.scanner_scheduled_sites": "0.16.0",
            "features.geoip_header_configured": "0.17.0",
        },
    ),
    "stands still": Fleet(installs=600, late=3),
    "falling": Fleet(installs=500, halves_in=30),
    "edition": Fleet(
        installs=2_000,
        values_of_ee={"features.rate_limit_enabled": {"true": 0.99, "false": 0.01}},
    ),
}
"""By what a test or a person calls them. Of ``edition`` it is the page under ``?edition=ee`` that
matters: fewer than 5 of these installs do not use the rate limit."""
