"""ConsentOS's tables are counted by ConsentOS's own rules, compared with a count in Python."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from app import database, facts
from app.payload import Census, Counts, bucket
from demo import consentos
from demo.consentos import Truth
from tests.conftest import Databases
from tests.support.database import plan_of, run

HOST = ("organisations", "users", "site_groups", "sites", "site_configs", "site_group_configs",
        "org_configs", "scan_jobs", "consent_records", "api_keys")  # fmt: skip
NOTHING = Truth(**dict.fromkeys(Truth.__dataclass_fields__, 0))


@pytest.fixture(scope="module")
def copy(databases: Databases, truth_and_template: tuple[Truth, str]) -> Iterator[Engine]:
    with databases.copy_of(truth_and_template[1]) as url:
        yield database.engine(url)


@pytest.fixture
def connection(copy: Engine) -> Iterator[Connection]:
    """A connection to the generated ConsentOS, whose transaction is rolled back."""
    with copy.connect() as connection:
        yield connection


@pytest.fixture
def emptied(connection: Connection) -> Connection:
    """The same connection, with empty tables."""
    connection.exec_driver_sql(f"TRUNCATE {', '.join(HOST)} CASCADE")
    return connection


def counted(connection: Connection) -> Truth:
    """Return the raw counts, which the module itself never returns."""
    row = dict(connection.execute(facts._CENSUS).mappings().one())  # noqa: SLF001 - only it has raw counts
    del row["server_version_num"]
    return Truth(**row)


def insert(connection: Connection, table: str, **values: object) -> Any:
    columns, marks = ", ".join(values), ", ".join(f":{name}" for name in values)
    statement = f"INSERT INTO {table} ({columns}) VALUES ({marks}) RETURNING id"
    return connection.execute(text(statement), values).scalar_one()


class TestTheGeneratedDatabase:
    def test_its_census_is_the_truth_in_buckets(self, connection: Connection, truth: Truth) -> None:
        found = facts.census(connection)
        assert found == Census(
            counts=Counts(
                orgs=bucket(truth.orgs),
                sites=bucket(truth.sites),
                users=bucket(truth.users),
                scans_last_24h=bucket(truth.scans_last_24h),
                consents_last_24h=bucket(truth.consents_last_24h),
            ),
            tcf_v22_sites=bucket(truth.tcf_v22_sites),
            auto_blocking_sites=bucket(truth.auto_blocking_sites),
            scanner_scheduled_sites=bucket(truth.scanner_scheduled_sites),
            server_version_num=found.server_version_num,
        )

    def test_its_counts_are_the_truth(self, connection: Connection, truth: Truth) -> None:
        assert counted(connection) == truth

    @pytest.mark.parametrize("seed", range(8))
    def test_any_other_company_is_counted_as_truly(
        self, emptied: Connection, monkeypatch: pytest.MonkeyPatch, seed: int
    ) -> None:
        monkeypatch.setattr(consentos, "CONSENTS", 30 + seed)
        assert counted(emptied) == NOTHING
        assert counted(emptied) != (truth := consentos.populate(emptied, seed))
        assert counted(emptied) == truth

    def test_the_truth_is_as_the_database_sees_it_when_nothing_is_there(
        self, emptied: Connection
    ) -> None:
        assert facts.census(emptied).counts == Counts(
            orgs="0", sites="0", users="0", scans_last_24h="0", consents_last_24h="0"
        )


CONFIG = {"tcf_enabled": True, "blocking_mode": "opt_in", "scan_schedule_cron": "0 3 * * *"}
ALL_FEATURES = {"tcf_v22_sites": 1, "auto_blocking_sites": 1, "scanner_scheduled_sites": 1}

Layer = dict[str, object]


def add_site(
    connection: Connection,
    *,
    org: Layer | None = None,
    group: Layer | None = None,
    site: Layer | None = None,
    **columns: object,
) -> None:
    """Add an organisation with a site in a group, and the layers of configuration given."""
    number = connection.scalar(text("SELECT count(*) FROM sites"))
    owner = insert(connection, "organisations", name="-", slug=f"o{number}")
    belongs = insert(connection, "site_groups", organisation_id=owner, name="-")
    row = {"organisation_id": owner, "site_group_id": belongs, "is_active": True, **columns}
    key = insert(connection, "sites", domain=f"d{number}", display_name="-", **row)
    if org is not None:
        insert(connection, "org_configs", organisation_id=owner, **org)
    if group is not None:
        insert(connection, "site_group_configs", site_group_id=belongs, **group)
    if site is not None:
        insert(connection, "site_configs", site_id=key, **site)


class TestASite:
    def test_that_is_live_counts_for_its_features(self, emptied: Connection) -> None:
        add_site(emptied, site=CONFIG)
        assert counted(emptied) == replace(NOTHING, orgs=1, sites=1, **ALL_FEATURES)

    def test_that_is_deleted_counts_for_nothing(self, emptied: Connection) -> None:
        add_site(emptied, site=CONFIG, deleted_at="2026-01-01T00:00:00Z")
        assert counted(emptied) == replace(NOTHING, orgs=1)

    def test_that_is_inactive_is_a_site_without_a_feature(self, emptied: Connection) -> None:
        add_site(emptied, site=CONFIG, is_active=False)
        assert counted(emptied) == replace(NOTHING, orgs=1, sites=1)

    def test_without_a_config_of_its_own_is_a_site_without_a_feature(
        self, emptied: Connection
    ) -> None:
        layer: Layer = {"tcf_enabled": True, "blocking_mode": "opt_in"}
        add_site(emptied, org=layer, group=layer)
        assert counted(emptied) == replace(NOTHING, orgs=1, sites=1)

    def test_without_a_group_inherits_from_its_organisation(self, emptied: Connection) -> None:
        layer: Layer = {"tcf_enabled": True, "blocking_mode": "opt_out"}
        add_site(emptied, org=layer, site={}, site_group_id=None)
        assert counted(emptied) == replace(NOTHING, orgs=1, sites=1, tcf_v22_sites=1)

    def test_that_sets_nothing_anywhere_has_the_systems_defaults(self, emptied: Connection) -> None:
        add_site(emptied, org={}, group={}, site={})
        assert counted(emptied) == replace(NOTHING, orgs=1, sites=1, auto_blocking_sites=1)

    def test_does_not_inherit_from_another_organisation(self, emptied: Connection) -> None:
        layer: Layer = {"tcf_enabled": True, "blocking_mode": "opt_out"}
        add_site(emptied, org=layer, group=layer)
        add_site(emptied, site={})
        assert counted(emptied) == replace(NOTHING, orgs=2, sites=2, auto_blocking_sites=1)

    @pytest.mark.parametrize(
        ("setting", "values", "counts", "default"),
        [
            ("tcf_enabled", (True, False), "tcf_v22_sites", False),
            ("blocking_mode", ("opt_in", "opt_out"), "auto_blocking_sites", "opt_in"),
        ],
    )
    def test_takes_each_setting_from_the_nearest_layer_that_has_one(
        self,
        emptied: Connection,
        setting: str,
        values: tuple[object, object],
        counts: str,
        default: object,
    ) -> None:
        layers: list[Layer | None] = [None, {}, {setting: values[0]}, {setting: values[1]}]
        for org, group, site in product(layers, layers, layers[1:]):
            with emptied.begin_nested() as tried:
                add_site(emptied, org=org, group=group, site=site)
                found = getattr(counted(emptied), counts)
                tried.rollback()
            own = [layer[setting] for layer in (site, group, org) if layer]
            expected = (own or [default])[0] == values[0]
            assert found == expected, f"{org=} {group=} {site=}"


class TestOrganisationsAndUsers:
    def test_that_are_deleted_do_not_count(self, emptied: Connection) -> None:
        gone = "2026-01-01T00:00:00Z"
        for n, deleted_at in enumerate([None, None, gone]):
            org = insert(emptied, "organisations", name="-", slug=f"o{n}", deleted_at=deleted_at)
            for email, left_at in ((f"stayed@{n}", None), (f"left@{n}", deleted_at)):
                person = {"email": email, "full_name": "-", "password_hash": "-"}
                insert(emptied, "users", organisation_id=org, deleted_at=left_at, **person)
        assert counted(emptied) == replace(NOTHING, orgs=2, users=5)


class TestTheLast24Hours:
    @pytest.mark.parametrize(
        ("ago", "counts"),
        [
            ("24 hours 1 microsecond", 0),
            ("24 hours", 0),
            ("23:59:59.999999", 1),
            ("1 microsecond", 1),
            ("0", 1),
            ("-1 microsecond", 0),
            ("-1 day", 0),
            ("-10 years", 0),
        ],
    )
    def test_begin_after_their_first_moment_and_end_with_the_present(
        self, emptied: Connection, ago: str, counts: int
    ) -> None:
        add_site(emptied)
        add_events(emptied, ago)
        found = counted(emptied)
        assert (found.scans_last_24h, found.consents_last_24h) == (counts, counts)

    def test_are_not_hidden_by_what_lies_in_the_future(self, emptied: Connection) -> None:
        add_site(emptied)
        add_events(emptied, "-1 hour", times=10_050)
        add_events(emptied, "1 hour", times=3)
        found = counted(emptied)
        assert (found.scans_last_24h, found.consents_last_24h) == (3, 3)


def add_events(connection: Connection, ago: str, *, times: int = 1) -> None:
    """Add scans and consents to the only site."""
    scans = (
        "INSERT INTO scan_jobs (site_id, created_at)"
        " SELECT id, now() - CAST(:ago AS interval) FROM sites, generate_series(1, :times)"
    )
    consents = (
        "INSERT INTO consent_records"
        " (site_id, visitor_id, action, ip_hash, user_agent, consented_at)"
        " SELECT id, '', '', '', '', now() - CAST(:ago AS interval)"
        " FROM sites, generate_series(1, :times)"
    )
    for statement in (scans, consents):
        connection.execute(text(statement), {"ago": ago, "times": times})


MANY = """
WITH n AS (SELECT n, gen_random_uuid() AS id FROM generate_series(1, 10050) AS n),
orgs AS (
    INSERT INTO organisations (id, name, slug) SELECT id, '-', n FROM n RETURNING id
), sites AS (
    INSERT INTO sites (id, organisation_id, domain, display_name) SELECT id, id, n, '-' FROM n
), configs AS (
    INSERT INTO site_configs (site_id, tcf_enabled, scan_schedule_cron) SELECT id, true, '@' FROM n
), users AS (
    INSERT INTO users (organisation_id, email, full_name, password_hash) SELECT id, n, '', '' FROM n
), scans AS (
    INSERT INTO scan_jobs (site_id) SELECT id FROM n
)
INSERT INTO consent_records (site_id, visitor_id, action, ip_hash, user_agent)
SELECT id, '', '', '', '' FROM n
"""


class TestTheTopBucket:
    def test_no_count_goes_past_it(self, emptied: Connection) -> None:
        emptied.exec_driver_sql(MANY)
        assert set(asdict(counted(emptied)).values()) == {10_000}
        assert set(facts.census(emptied).counts.model_dump().values()) == {"10k+"}


CONSENTS = """
INSERT INTO consent_records (site_id, visitor_id, action, ip_hash, user_agent, consented_at)
SELECT gen_random_uuid(), md5(n::text), 'accept_all', md5(n::text), 'Mozilla/5.0 (X11; Linux)',
       now() - n * interval '1 day' / 100000
FROM generate_series(200000, 1, -1) AS n
"""
"""As many old rows as new ones, in order of time, as wide as real rows. Without statistics,
Postgres guesses the number of rows from the size of the table, and it sorts if they seem few."""

UNKNOWN = """
ALTER TABLE consent_records RENAME TO analyzed;
CREATE TABLE consent_records (LIKE analyzed INCLUDING DEFAULTS) WITH (autovacuum_enabled = off);
DROP TABLE analyzed;
CREATE INDEX ix_consent_records_consented_at ON consent_records (consented_at);
"""
"""A table without statistics, for which autovacuum collects none."""


@pytest.mark.parametrize("known", [False, True], ids=["never analyzed", "vacuumed and analyzed"])
def test_consents_are_read_from_their_index_with_and_without_statistics(
    db: Engine, *, known: bool
) -> None:
    run(db, UNKNOWN)
    run(db, CONSENTS)
    if known:
        with db.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.exec_driver_sql("VACUUM (ANALYZE) consent_records")
    with db.begin() as connection:
        plan = plan_of(connection, facts._CENSUS.text, analyze=True)  # noqa: SLF001 - as above
    (scan,) = [node for node in plan if node.get("Relation Name") == "consent_records"]
    assert scan.get("Index Name") == "ix_consent_records_consented_at"
    assert "consented_at" in scan["Index Cond"]
    assert scan["Actual Rows"] == 10_000
