-- ConsentOS's tables as its Alembic revision 0009 leaves them, reduced to what the demo and the tests need.

CREATE TABLE alembic_version (
    version_num varchar(32) PRIMARY KEY
);
INSERT INTO alembic_version VALUES ('0009');

CREATE TABLE instance (
    id                uuid PRIMARY KEY,
    created_at        timestamptz NOT NULL,
    updated_at        timestamptz NOT NULL,
    last_telemetry_at timestamptz
);

CREATE TABLE organisations (
    id            uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name          varchar NOT NULL,
    slug          varchar NOT NULL UNIQUE,
    contact_email varchar,
    billing_plan  varchar NOT NULL DEFAULT 'free',
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now(),
    deleted_at    timestamptz
);

CREATE TABLE users (
    id              uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    organisation_id uuid NOT NULL REFERENCES organisations,
    email           varchar NOT NULL UNIQUE,
    full_name       varchar NOT NULL,
    password_hash   varchar NOT NULL,
    role            varchar NOT NULL DEFAULT 'viewer',
    last_login_at   timestamptz,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    deleted_at      timestamptz
);
CREATE INDEX ix_users_organisation_id ON users (organisation_id);

CREATE TABLE api_keys (
    id              uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    organisation_id uuid NOT NULL REFERENCES organisations,
    name            varchar NOT NULL,
    key_hash        varchar NOT NULL UNIQUE,
    scopes          jsonb NOT NULL DEFAULT '[]',
    created_at      timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE site_groups (
    id              uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    organisation_id uuid NOT NULL REFERENCES organisations,
    name            varchar NOT NULL,
    description     text,
    created_at      timestamptz NOT NULL DEFAULT now(),
    UNIQUE (organisation_id, name)
);

CREATE TABLE sites (
    id              uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    organisation_id uuid NOT NULL REFERENCES organisations,
    site_group_id   uuid REFERENCES site_groups ON DELETE SET NULL,
    domain          varchar NOT NULL UNIQUE,
    display_name    varchar NOT NULL,
    other_domains   jsonb NOT NULL DEFAULT '[]',
    is_active       boolean NOT NULL DEFAULT true,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    deleted_at      timestamptz
);
CREATE INDEX ix_sites_organisation_id ON sites (organisation_id);
CREATE INDEX ix_sites_site_group_id ON sites (site_group_id);

-- The three layers of the configuration: NULL means the value of the layer above.

CREATE TABLE org_configs (
    id                 uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    organisation_id    uuid NOT NULL UNIQUE REFERENCES organisations ON DELETE CASCADE,
    tcf_enabled        boolean,
    blocking_mode      varchar,
    banner_copy        jsonb,
    privacy_policy_url varchar,
    updated_at         timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE site_group_configs (
    id                 uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    site_group_id      uuid NOT NULL UNIQUE REFERENCES site_groups ON DELETE CASCADE,
    tcf_enabled        boolean,
    blocking_mode      varchar,
    banner_copy        jsonb,
    privacy_policy_url varchar,
    updated_at         timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE site_configs (
    id                 uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    site_id            uuid NOT NULL UNIQUE REFERENCES sites ON DELETE CASCADE,
    tcf_enabled        boolean,
    blocking_mode      varchar,
    banner_copy        jsonb,
    privacy_policy_url varchar,
    scan_schedule_cron varchar,
    updated_at         timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE translations (
    id      uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    site_id uuid NOT NULL REFERENCES sites ON DELETE CASCADE,
    locale  varchar NOT NULL,
    title   varchar NOT NULL,
    body    text NOT NULL,
    UNIQUE (site_id, locale)
);

CREATE TABLE cookies (
    id            uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    site_id       uuid NOT NULL REFERENCES sites ON DELETE CASCADE,
    name          varchar NOT NULL,
    domain        varchar NOT NULL,
    category      varchar NOT NULL DEFAULT 'unclassified',
    description   text,
    first_seen_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (site_id, name, domain)
);

CREATE TABLE scan_jobs (
    id            uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    site_id       uuid NOT NULL REFERENCES sites ON DELETE CASCADE,
    status        varchar NOT NULL DEFAULT 'pending',
    trigger       varchar NOT NULL DEFAULT 'manual',
    pages_scanned integer NOT NULL DEFAULT 0,
    result        jsonb,
    error_message text,
    notes         text,
    created_at    timestamptz NOT NULL DEFAULT now(),
    completed_at  timestamptz
);
CREATE INDEX ix_scan_jobs_site_id ON scan_jobs (site_id);

CREATE TABLE consent_records (
    id           uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    site_id      uuid NOT NULL REFERENCES sites ON DELETE CASCADE,
    visitor_id   varchar NOT NULL,
    action       varchar NOT NULL,
    categories   jsonb NOT NULL DEFAULT '[]',
    tc_string    text,
    ip_hash      varchar NOT NULL,
    user_agent   text NOT NULL,
    page_url     text,
    country_code varchar,
    consented_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ix_consent_records_site_id ON consent_records (site_id);
CREATE INDEX ix_consent_records_consented_at ON consent_records (consented_at);
