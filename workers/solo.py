"""Worker and scheduler in one process, for a small install: ``python -m workers.solo``."""

from dramatiq import Worker

from workers import scheduler

THREADS = 2
"""The same number as in the Procfile's worker. A drain may occupy one while it waits for a row."""

SHUTDOWN_MS = 2000
"""The time for the threads, and again for the consumer. honcho kills after 5 seconds in all."""


def main() -> None:
    """Run until SIGTERM or SIGINT, then settle a running delivery."""
    ticking = scheduler.boot()
    worker = Worker(ticking.broker, worker_threads=THREADS)
    ticking.broker.emit_after("process_boot")
    worker.start()
    ticking.run()
    worker.stop(timeout=SHUTDOWN_MS)


if __name__ == "__main__":
    main()
