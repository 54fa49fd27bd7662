"""Alembic's entry: runs on the connection and in the transaction that ``migrate`` opened."""

from alembic import context

options = context.config.attributes
context.configure(connection=options["connection"], version_table=options["version_table"])
context.run_migrations()
