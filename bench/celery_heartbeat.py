"""The same job as a plain Celery task, to compare the pipeline with: count, POST, stamp.

It uses the libraries that ConsentOS uses: pydantic, async SQLAlchemy on asyncpg, httpx.
The tables are counted with ``count(*)``, the heartbeat leaves from inside the task, and nothing is
kept.
"""

import asyncio
import logging
from typing import Any
from uuid import UUID, uuid4

import httpx
from celery import Celery
from celery.schedules import crontab
from pydantic import BaseModel
from pydantic_settings import BaseSettings
from sqlalchemy import NullPool, text
from sqlalchemy.ext.asyncio import create_async_engine

from bench.plain import COUNT


class Settings(BaseSettings):
    """The environment."""

    database_url: str
    redis_url: str
    telemetry_endpoint: str


class Heartbeat(BaseModel):
    """What is sent."""

    instance_id: UUID
    counts: dict[str, int]


settings = Settings()  # type: ignore[call-arg]  # found in the environment
app = Celery("heartbeat", broker=settings.redis_url)
app.conf.update(
    timezone="UTC",
    task_ignore_result=True,
    beat_schedule={
        "telemetry-heartbeat": {
            "task": "bench.celery_heartbeat.heartbeat",
            "schedule": crontab(hour="2", minute="30"),
        }
    },
)


@app.task  # type: ignore[untyped-decorator]  # Celery has no types
def heartbeat() -> None:
    """Count ConsentOS's tables and POST what was counted."""
    asyncio.run(_heartbeat())


async def _heartbeat() -> None:
    engine = create_async_engine(settings.database_url, poolclass=NullPool)
    async with engine.begin() as connection:
        counts: dict[str, Any] = dict((await connection.execute(text(COUNT))).mappings().one())
        await connection.execute(
            text(
                "INSERT INTO instance SELECT :id, now(), now()"
                " WHERE NOT EXISTS (SELECT FROM instance)"
            ),
            {"id": uuid4()},
        )
        instance_id = await connection.scalar(text("SELECT id FROM instance"))
        payload = Heartbeat(instance_id=instance_id, counts=counts)
        async with httpx.AsyncClient(timeout=10) as client:
            answer = await client.post(
                settings.telemetry_endpoint, json=payload.model_dump(mode="json")
            )
            answer.raise_for_status()
        await connection.execute(text("UPDATE instance SET last_telemetry_at = now()"))
    logging.getLogger(__name__).info("heartbeat sent: %s", payload)
