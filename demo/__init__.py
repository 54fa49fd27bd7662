"""``make demo`` and its parts, which the tests and the bench use too.

Disposable Postgres and Valkey servers, a small ConsentOS database, and a simulated fleet.
"""
