"""The simple way to count: every row of every table."""

COUNT = """
SELECT
    (SELECT count(*) FROM organisations) AS orgs,
    (SELECT count(*) FROM sites) AS sites,
    (SELECT count(*) FROM users) AS users,
    (SELECT count(*) FROM scan_jobs
     WHERE created_at > now() - interval '24 hours') AS scans_last_24h,
    (SELECT count(*) FROM consent_records
     WHERE consented_at > now() - interval '24 hours') AS consents_last_24h,
    (SELECT count(*) FROM site_configs WHERE tcf_enabled) AS tcf_v22_sites,
    (SELECT count(*) FROM site_configs WHERE blocking_mode = 'opt_in') AS auto_blocking_sites,
    (SELECT count(*) FROM site_configs
     WHERE scan_schedule_cron IS NOT NULL) AS scanner_scheduled_sites
"""
