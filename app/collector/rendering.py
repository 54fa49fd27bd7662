"""The templates: HTML, SVG and XML of the page, the badge, the feed and the pages of errors."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined

from app.collector import badge, events, phrases, store, view
from app.collector.stats import Stats


class Templates:
    """Renders each template in the same style."""

    def __init__(
        self, *, established_days: int = store.ESTABLISHED_DAYS, private: bool = False
    ) -> None:
        """Load the templates.

        An install is established after heartbeats on ``established_days`` different days. If the
        pages are ``private``, they ask search engines not to index them.
        """
        self._established_days = established_days
        self._templates = Environment(
            loader=PackageLoader("app.collector"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals.update(
            style=style()[0],
            long_date=phrases.long_date,
            moment=phrases.moment,
            private=private,
        )

    def page(
        self,
        stats: Stats,
        *,
        days: str = "90",
        query: str = "",
        counting_stopped: bool = False,
        requests: Mapping[str, int] | None = None,
    ) -> str:
        """Return the page of a range of ``days``; it links to JSON and CSV of the same ``query``.

        ``requests`` is how many requests of the day before had which outcome.
        """
        return self._templates.get_template("page.html").render(
            stats=stats,
            view=view.of(
                stats,
                counting_stopped=counting_stopped,
                established_days=self._established_days,
            ),
            days=days,
            query=query,
            ranges=view.RANGES,
            requests=view.requests(requests),
        )

    def picture(self, shown: badge.Badge) -> str:
        """Return the picture of a badge."""
        return self._templates.get_template("badge.svg").render(
            badge=shown, label=badge.LABEL, padding=badge.PADDING
        )

    def feed(self, stats: Stats, *, counting_stopped: bool) -> str:
        """Return the Atom feed of notable events; ``stats`` has a year of all installs."""
        found = events.of(stats, counting_stopped=counting_stopped)
        return self._templates.get_template("feed.xml").render(
            id=events.FEED, updated=events.updated(stats, found), events=found
        )

    def heartbeat(
        self, purposes: Mapping[str, Sequence[str]], *, retention_days: int, schema: str
    ) -> str:
        """Return the page that lists the fields of a heartbeat, each with its purpose.

        A purpose is a list of parts; every second part is code. The JSON Schema of a heartbeat is
        at the path ``schema``. Heartbeats are stored for ``retention_days``, or forever if it is 0.
        """
        return self._templates.get_template("heartbeat.html").render(
            purposes=purposes, retention_days=retention_days, schema=schema
        )

    def refusal(self, sentence: str, *, title: str = "Nothing to show") -> str:
        """Return a page that says why there is nothing to show."""
        return self._templates.get_template("refusal.html").render(title=title, sentence=sentence)


def style() -> tuple[str, bytes]:
    """Return the path of the style sheet, which changes with its content, and the content."""
    content = files("app.collector").joinpath("static", "style.css").read_bytes()
    return f"/static/style-{hashlib.sha256(content).hexdigest()[:12]}.css", content
