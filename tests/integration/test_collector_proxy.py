"""The proxy of deploy/collector, as Debian's nginx, before two of the collector's processes."""

import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme

from tests.support.collector import BODY, JSON, Collector, answer, head, of, query, serving
from tests.support.ports import free_port
from tests.support.processes import ROOT

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
CONFIGURATION = ROOT / "deploy" / "collector" / "nginx.conf"
FORGED = {"X-Forwarded-For": "198.51.100.7, 127.0.0.1", "Forwarded": "for=198.51.100.7"}

pytestmark = pytest.mark.skipif(not NGINX, reason="apt install nginx; `make test-versions` has it")


@dataclass(frozen=True)
class Proxy:
    """nginx with the project's configuration, before collectors on two ports."""

    port: int
    plain: int
    behind: tuple[int, int]
    trust: ssl.SSLContext
    directory: Path

    def client(self, address: str = "127.0.0.2") -> httpx.Client:
        """Return a client that connects from an address of loopback."""
        transport = httpx.HTTPTransport(verify=self.trust, local_address=address)
        base = f"https://localhost:{self.port}"
        return httpx.Client(transport=transport, base_url=base, headers=JSON, timeout=20)

    def log(self) -> str:
        return (self.directory / "log").read_text()


def configured(proxy: Proxy) -> str:
    """Return the configuration with the ports and the directories of a test."""
    page = CONFIGURATION.read_text()
    changes = {
        "web-1:8000": f"127.0.0.1:{proxy.behind[0]}",
        "web-2:8000": f"127.0.0.1:{proxy.behind[1]}",
        "listen 443": f"listen {proxy.port}",
        "listen 80": f"listen {proxy.plain}",
        "/etc/nginx/tls": str(proxy.directory),
        "/var/www/acme": str(proxy.directory / "acme"),
    }
    for old, new in changes.items():
        assert old in page
        page = page.replace(old, new)
    kept = " ".join(
        f"{kind}_temp_path {proxy.directory / kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    own = f"{user} daemon off; pid {proxy.directory / 'pid'};"
    return f"{own}\n{page.replace('http {', f'http {{ {kept}', 1)}"


@pytest.fixture
def proxy(tmp_path: Path, authority: trustme.CA) -> Iterator[Proxy]:
    port, plain, *behind = (free_port() for _ in range(4))
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    found = Proxy(port, plain, (behind[0], behind[1]), trust, tmp_path)
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "privkey.pem")
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(tmp_path / "fullchain.pem", append=True)
    (tmp_path / "nginx.conf").write_text(configured(found))
    with (tmp_path / "log").open("wb") as output:
        process = subprocess.Popen(
            [str(NGINX), "-c", tmp_path / "nginx.conf", "-p", tmp_path],
            stdout=output,
            stderr=output,
        )
    try:
        wait_for(port, process)
        yield found
    finally:
        process.terminate()
        process.wait(10)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while True:
        assert process.poll() is None
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        assert time.monotonic() < deadline
        time.sleep(0.02)


@dataclass(frozen=True)
class Fleet:
    """The processes behind the proxy: each may be ended and started again at its port."""

    url: str
    proxy: Proxy
    rate: str

    def start(self, number: int, *, ending: int = 0) -> tuple[ExitStack, Collector]:
        stack = ExitStack()
        log = self.proxy.directory / f"web-{number}-{time.monotonic_ns()}"
        port = str(self.proxy.behind[number])
        # The one proxy that is believed is on 127.0.0.1, and no client of the tests is.
        running = serving(
            self.url,
            log,
            ending=ending,
            PORT=port,
            COLLECTOR_CLIENT_RATE=self.rate,
            FORWARDED_ALLOW_IPS="127.0.0.1",
        )
        return stack, stack.enter_context(running)


def test_an_address_that_a_client_claims_is_not_believed(migrated: str, proxy: Proxy) -> None:
    fleet = Fleet(migrated, proxy, rate="2")
    (first, _), (second, _) = fleet.start(0), fleet.start(1)
    with first, second, proxy.client("127.0.0.2") as liar, proxy.client("127.0.0.3") as other:
        statuses = [
            liar.post(
                "/v1/heartbeat", content=BODY, headers={**FORGED, "X-Forwarded-For": f"10.0.0.{n}"}
            ).status_code
            for n in range(10)
        ]
        assert Counter(statuses) == {202: 4, 429: 6}  # two a minute in each process
        # Who was named instead has lost nothing by it.
        pretended = {**FORGED, "X-Forwarded-For": "127.0.0.3"}
        assert liar.post("/v1/heartbeat", content=BODY, headers=pretended).status_code == 429
        assert other.post("/v1/heartbeat", content=of(1)).status_code == 202
    busiest = "SELECT requests FROM ingest WHERE outcome = 'from the busiest client'"
    assert query(migrated, busiest) == [(9,)]


def test_a_web_process_that_is_killed_or_restarted_loses_nothing_that_was_acknowledged(
    migrated: str, proxy: Proxy
) -> None:
    fleet = Fleet(migrated, proxy, rate="0")
    killed, victim = fleet.start(0, ending=-9)
    other, _ = fleet.start(1)
    acknowledged: list[int] = []
    statuses: Counter[int] = Counter()
    ended = threading.Event()

    def send(worker: int) -> None:
        with proxy.client() as client:
            number = worker
            while not ended.is_set():
                status = client.post("/v1/heartbeat", content=of(number)).status_code
                statuses[status] += 1
                if status == 202:
                    acknowledged.append(number)
                number += 4

    with ThreadPoolExecutor(4) as pool:
        sending = [pool.submit(send, worker) for worker in range(4)]
        try:
            time.sleep(1)
            victim.process.kill()
            time.sleep(1)
            killed.close()
            again, _ = fleet.start(0)
            time.sleep(6)  # nginx asks it again after 5 seconds
            other.close()  # a rolling restart goes on with the other one
            time.sleep(1)
            other, _ = fleet.start(1)
            time.sleep(1)
        finally:
            ended.set()
    for each in sending:
        each.result()
    again.close()
    other.close()
    stored = {str(row[0])[:8] for row in query(migrated, "SELECT instance_id FROM heartbeat")}
    assert {f"{number:08x}" for number in acknowledged} <= stored
    assert len(acknowledged) > 100
    assert set(statuses) == {202}
    assert proxy.log() == ""


def test_what_is_slow_too_large_or_plain_does_not_reach_a_collector_and_nothing_is_logged(
    migrated: str, proxy: Proxy
) -> None:
    fleet = Fleet(migrated, proxy, rate="0")
    (first, _), (second, _) = fleet.start(0), fleet.start(1)
    with first, second, proxy.client() as client:
        began = time.monotonic()
        with (
            socket.create_connection(("localhost", proxy.port)) as raw,
            proxy.trust.wrap_socket(raw, server_hostname="localhost") as silent,
        ):
            silent.sendall(head()[:-2])
            assert answer(silent) == b""
        assert 4 < time.monotonic() - began < 9
        assert client.get("/", headers={"X-Long": "x" * 9_000}).status_code == 400
        assert client.post("/v1/heartbeat", content=BODY.ljust(40_000)).status_code == 413
        refused = client.post("/v1/heartbeat", content=BODY.ljust(20_000))
        assert (refused.status_code, "error" in refused.json()) == (413, True)
        assert client.get("/readyz").json() == {"ready": True}
        plain = httpx.get(f"http://localhost:{proxy.plain}/?days=30", trust_env=False)
        assert (plain.status_code, plain.headers["location"]) == (
            301,
            "https://localhost/?days=30",
        )
    # All three are gone: even then no line names a client.
    with proxy.client() as client:
        assert client.get("/healthz").status_code == 502
    assert proxy.log() == ""
    written = [each for each in proxy.directory.rglob("*") if each.is_file()]
    assert not [each for each in written if "127.0.0.2" in each.read_text(errors="replace")]
    assert query(migrated, "SELECT requests FROM ingest WHERE outcome = 'too large'") == [(1,)]


def test_nginx_takes_the_configuration_without_a_warning(proxy: Proxy) -> None:
    tested = subprocess.run(
        [str(NGINX), "-t", "-c", proxy.directory / "nginx.conf", "-p", proxy.directory],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert tested.returncode == 0
    assert not re.search(r"\[(warn|error|emerg)\]", tested.stderr)
