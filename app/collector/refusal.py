"""How a failed request is answered: a browser gets a page, any other client gets JSON."""

import re
from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from app.collector import intake
from app.collector.caching import NO_STORE
from app.collector.rendering import Templates

API = "/v1/"
"""Paths that begin with this are always answered in JSON."""

_WORDS = {
    401: ("This page needs a token", "Enter the token of this collector as the password."),
    404: ("Page not found", "There is no page at this address."),
    405: ("Method not allowed", "This address does not accept this kind of request."),
    429: ("Too many wrong tokens", "Wait a few seconds, then try again."),
    500: ("Something went wrong", "The collector failed. Try again later."),
}
"""The title and the sentence of the page for each status."""
_OTHER = ("Nothing to show", "The collector cannot answer this request.")

_QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


def of(request: Request, error: Exception, templates: Templates) -> Response:
    """Return the answer to a request that has failed."""
    answer = intake.explain(error)
    if request.scope["path"].startswith(API) or not _prefers_html(request):
        return answer
    title, sentence = _WORDS.get(answer.status_code, _OTHER)
    page = HTMLResponse(templates.refusal(sentence, title=title), answer.status_code, NO_STORE)
    for name, value in answer.headers.items():  # WWW-Authenticate, Retry-After, Allow
        page.headers.setdefault(name, value)
    return page


def _prefers_html(request: Request) -> bool:
    """Return whether the client prefers a page to JSON, as browsers do."""
    ranges = [*_ranges(",".join(request.headers.getlist("accept")))]
    return _rank("text", "html", ranges) > _rank("application", "json", ranges)


def _ranges(accept: str) -> Iterator[tuple[str, str, float]]:
    """Yield the types and subtypes that Accept names, each with its quality."""
    for each in accept.lower().split(","):
        media_type, *parameters = (part.strip() for part in each.split(";"))
        kind, _, subtype = media_type.partition("/")
        given = (part.removeprefix("q=") for part in parameters if part.startswith("q="))
        quality = next(given, "1")
        if _QUALITY.fullmatch(quality):
            yield kind, subtype, float(quality)


def _rank(kind: str, subtype: str, ranges: list[tuple[str, str, float]]) -> tuple[float, int]:
    """Return how much the client wants a media type: its quality, then how exactly it is named."""
    # The most exact range that matches decides (RFC 9110).
    exact, quality = max(
        (
            ((of_kind != "*") + (of_subtype != "*"), quality)
            for of_kind, of_subtype, quality in ranges
            if of_kind in {kind, "*"} and of_subtype in {subtype, "*"}
        ),
        default=(0, 0.0),
    )
    return (quality, exact) if quality else (0.0, 0)
