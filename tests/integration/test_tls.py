"""Why TLS with a receiver failed, in fixed words of OpenSSL; and what needs no TLS."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from urllib.parse import urlsplit

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app import sender
from app.retry import Outcome
from tests.support.proxy import proxying
from tests.support.receiver import Receiver, answer

BODY = b'{"telemetry_schema":1}'
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def certificates_read_anew() -> Iterator[None]:
    sender.tls_context.cache_clear()
    yield
    sender.tls_context.cache_clear()


def post(url: str) -> Outcome:
    target = sender.Target(url, schema=1, timeout=5)
    return sender.post(target, BODY, at=datetime.now(UTC), stopping=Event())


@contextmanager
def serving(receiver: Receiver, certificate: trustme.LeafCert) -> Iterator[str]:
    """Run a receiver over TLS with a certificate; give its address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    with proxying("tunnel", urlsplit(receiver.url).port or 0, context) as tunnel:
        yield f"https://127.0.0.1:{tunnel.port}/v1"


@pytest.fixture
def trusted(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """The authority, which SSL_CERT_FILE names."""
    bundle = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(bundle))
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    return authority


def test_an_unknown_issuer_is_named(receiver: Receiver, authority: trustme.CA) -> None:
    with serving(receiver, authority.issue_cert("127.0.0.1")) as url:
        assert post(url).error == "tls: unable to get local issuer certificate"


def test_an_expired_certificate_is_named(receiver: Receiver, trusted: trustme.CA) -> None:
    with serving(receiver, trusted.issue_cert("127.0.0.1", not_after=LONG_AGO)) as url:
        assert post(url).error == "tls: certificate has expired"


@pytest.mark.parametrize(
    ("host", "error"), [("localhost", "Hostname mismatch"), ("127.0.0.1", "IP address mismatch")]
)
def test_a_certificate_of_another_host_is_named_without_the_host(
    receiver: Receiver, trusted: trustme.CA, host: str, error: str
) -> None:
    with serving(receiver, trusted.issue_cert("collector.invalid")) as url:
        assert post(url.replace("127.0.0.1", host)).error == f"tls: {error}"


def test_a_receiver_without_tls_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer(400))

        thread = Thread(target=refuse)
        thread.start()
        error = post(f"https://127.0.0.1:{listener.getsockname()[1]}/v1").error
        thread.join()
    assert error == "tls: the receiver does not speak TLS"


def authority_without_key_usage(path: Path) -> ssl.SSLContext:
    """Write the certificate of an old authority; return a server's context certified by it."""
    key, own_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "old authority")])
    now = datetime.now(UTC)
    start = (
        x509.CertificateBuilder()
        .issuer_name(name)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
    )
    ca = (
        start.subject_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    leaf = (
        start.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "leaf")]))
        .public_key(own_key.public_key())
        .serial_number(2)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    path.write_bytes(ca.public_bytes(pem))
    own = path.with_name("own.pem")
    own.write_bytes(
        leaf.public_bytes(pem)
        + own_key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own)
    return context


def test_an_authority_without_a_key_usage_is_named_where_python_asks_for_one(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "authority.pem"
    context = authority_without_key_usage(bundle)
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    is_strict = bool(ssl.create_default_context().verify_flags & ssl.VERIFY_X509_STRICT)
    with proxying("tunnel", urlsplit(receiver.url).port or 0, context) as tunnel:
        outcome = post(f"https://localhost:{tunnel.port}/v1")
    expected = "tls: CA cert does not include key usage extension" if is_strict else None
    assert outcome.error == expected


@pytest.mark.parametrize("text", [None, "", "no certificate"], ids=["missing", "empty", "text"])
class TestAFileThatCannotBeRead:
    @pytest.fixture(autouse=True)
    def named(self, text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "authority.pem"
        if text is not None:
            file.write_text(text)
        monkeypatch.setenv("SSL_CERT_FILE", str(file))

    def test_is_a_reason_of_its_own(self, receiver: Receiver, authority: trustme.CA) -> None:
        with serving(receiver, authority.issue_cert("127.0.0.1")) as url:
            outcome = post(url)
        assert (outcome.result, outcome.error) == (
            "retryable",
            "tls: SSL_CERT_FILE cannot be read",
        )

    def test_keeps_no_post_from_leaving_that_needs_no_tls(self, receiver: Receiver) -> None:
        assert post(receiver.url).result == "sent"


@pytest.mark.parametrize("headers", [["3600", "3600"], ["3600, 3600"]])
def test_a_retry_after_that_is_given_twice_counts_as_what_it_says(
    receiver: Receiver, headers: list[str]
) -> None:
    receiver.answers = [answer(503, *(f"Retry-After: {each}" for each in headers))]
    assert post(receiver.url).retry_after == timedelta(hours=1)
