"""Chooses the proxy for a POST, by the variables that curl and others read. Pure.

No variable may block every POST: an invalid value is ignored, with a warning that does not contain
the value.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from urllib.parse import SplitResult, quote, urlsplit

from app.settings.urls import host_and_port, is_address, is_host

SCHEMES = frozenset({"http", "https", "socks5", "socks5h"})
DEFAULT_PORTS = {"http": 80, "https": 443}
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@dataclass(frozen=True)
class Choice:
    """The proxy's URL, which may contain a password, or None for no proxy."""

    url: str | None = field(default=None, repr=False)
    warnings: tuple[str, ...] = ()


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return only the proxy variables; the lower-case name wins over the upper-case one."""
    found = {}
    for name in NAMES:
        spelt = name if name in environment else name.upper()
        if value := environment.get(spelt, "").strip():
            found[spelt] = value
    return found


def choose(environment: Mapping[str, str], endpoint: str) -> Choice:
    """Choose the endpoint's proxy: HTTP(S)_PROXY, else ALL_PROXY, unless NO_PROXY exempts it."""
    given = {name.lower(): (name, value) for name, value in variables(environment).items()}
    target = urlsplit(endpoint)
    warnings = []
    for name in (f"{target.scheme}_proxy", "all_proxy"):
        variable, value = given.get(name, ("", ""))
        if url := proxy_url(value):
            exempted = _exempted(given.get("no_proxy", ("", ""))[1], target)
            if None in exempted:
                spelt = given["no_proxy"][0]
                warnings.append(f"{spelt} has an invalid entry, which is ignored")
            return Choice(None if True in exempted else url, tuple(warnings))
        if value:
            warnings.append(f"{variable} is not a valid proxy URL, and is ignored")
    return Choice(None, tuple(warnings))


def _exempted(no_proxy: str, target: SplitResult) -> set[bool | None]:
    host = (target.hostname or "").rstrip(".")
    port = target.port or DEFAULT_PORTS[target.scheme]
    return {exempts(entry, host, port) for entry in re.split(r"[\s,]+", no_proxy) if entry}


def proxy_url(value: str) -> str | None:
    """Return a proxy's URL in the form that the client accepts, or None if it is invalid.

    It is rebuilt from its parts, so that nothing else in it can make the client fail.
    """
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        host, port = parts.hostname or "", parts.port
        login = "".join(
            [quote(parts.username or "", safe="%"), ":", quote(parts.password or "", safe="%"), "@"]
        )
    except ValueError:
        return None
    beyond = parts.path.strip("/") or parts.query or parts.fragment
    if parts.scheme not in SCHEMES or not is_host(host) or "%" in host or port == 0 or beyond:
        return None
    place = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{login if login != ':@' else ''}{place}{f':{port}' if port else ''}"


def exempts(entry: str, host: str, port: int) -> bool | None:
    """Whether an entry of NO_PROXY names this host and port; None if the entry is invalid.

    A name matches itself and its subdomains, with or without a leading dot or ``*.``.
    """
    entry = entry.lower().rpartition("://")[2]
    if entry == "*":
        return True
    if "/" in entry:
        return _holds(re.sub(r"[\[\]]", "", entry), host)
    found = host_and_port(entry)
    if found is None:
        return None
    name = re.sub(r"^\*?\.", "", found[0]).rstrip(".")
    if not is_host(name):
        return None
    same_port = not found[1] or int(found[1]) == port
    return same_port and _is_of(host, name)


def _is_of(host: str, name: str) -> bool:
    if is_address(name):
        return is_address(host) and ip_address(name) == ip_address(host)
    return host == name or host.endswith(f".{name}")


def _holds(network: str, host: str) -> bool | None:
    try:
        addresses = ip_network(network, strict=False)
    except ValueError:
        return None
    return is_address(host) and ip_address(host) in addresses
