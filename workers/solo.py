"""Worker and scheduler in one process, for a small install: ``python -m workers.solo``."""

from dramatiq import Worker

from workers import scheduler

THREADS = 2
"""As many as the Procfile's worker has: a drain may wait for its second in one of them."""

SHUTDOWN_MS = 2000
"""For its threads, and again for its consumer: a runner such as honcho kills after 5 seconds."""


def main() -> None:
    """Run until SIGTERM or SIGINT, then settle what is on its way."""
    ticking = scheduler.boot()
    worker = Worker(ticking.broker, worker_threads=THREADS)
    ticking.broker.emit_after("process_boot")
    worker.start()
    ticking.run()
    worker.stop(timeout=SHUTDOWN_MS)


if __name__ == "__main__":
    main()
