"""The geometry of the page's charts, as SVG that needs neither a script nor a style. Pure.

A plot is stretched to the available width: its paths have ``WIDTH`` units from left to right, and
one unit per pixel from top to bottom. The words are outside the plot, so they are neither stretched
nor overlap. A number that is not shown is a gap.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH = 1000
HEIGHT = 200
STOPS = 92
"""At most so many points have numbers to read on hover or focus."""
FEW_HEIGHT = 4
"""The pixels of a bar whose number is not shown."""
TICKS = 6


@dataclass(frozen=True)
class Series:
    """A name, the class of its marks, and a number or None for each point, and the same in words.

    It may end before the axis does.
    """

    name: str
    mark: str
    numbers: Sequence[float | None]
    words: Sequence[str]


@dataclass(frozen=True)
class Axis:
    """The points from left to right, and the names below the plot."""

    names: Sequence[str]
    ticks: Mapping[int, str]

    @property
    def per_stop(self) -> int:
        """How many points share a stop."""
        return -(-len(self.names) // STOPS)

    @property
    def slots(self) -> int:
        """How many points have room: a multiple of ``per_stop``."""
        return -(-len(self.names) // self.per_stop) * self.per_stop

    def at(self, index: int) -> float:
        """Return where the middle of a point is, from 0 to ``WIDTH``."""
        free = self.slots - len(self.names)
        return round(WIDTH * (free + index + 0.5) / self.slots, 1)


@dataclass(frozen=True)
class Mark:
    """A path, and the class that says how it looks."""

    mark: str
    path: str


@dataclass(frozen=True)
class Dot:
    """The last number of a line: in percent of the width, and in pixels from the top."""

    mark: str
    x: float
    y: float


@dataclass(frozen=True)
class Key:
    """An entry of the legend: a name, its mark, and the last number."""

    name: str
    mark: str
    shape: Literal["line", "bar"]
    words: str


@dataclass(frozen=True)
class Tick:
    """A value on an axis: its text, and its position in pixels (y) or percent (x)."""

    text: str
    at: float
    role: str = ""
    """A CSS class for its place: some ticks are hidden on narrow screens."""


@dataclass(frozen=True)
class Chart:
    """Everything that the template draws."""

    keys: list[Key]
    marks: list[Mark]
    dots: list[Dot]
    y_ticks: list[Tick]
    x_ticks: list[Tick]
    stops: list[str]
    """The numbers at each stop, from left to right, in words."""
    height: int = HEIGHT

    @property
    def has_few(self) -> bool:
        """Whether there are bars whose numbers are not shown."""
        return any(mark.mark.endswith(" few") for mark in self.marks)


def lines(axis: Axis, series: Sequence[Series], *, unit: str = "") -> Chart | None:
    """Draw a line for each series; None if no number is above zero."""
    highest = max((number for each in series for number in each.numbers if number), default=0)
    if not highest:
        return None
    step, count = _scale(highest)

    def y(number: float) -> float:
        return round(HEIGHT * (1 - number / (step * count)), 1)

    marks = [Mark(each.mark, _line(axis, each, y)) for each in series]
    return Chart(
        keys=[Key(each.name, each.mark, "line", each.words[-1]) for each in series],
        marks=[mark for mark in marks if mark.path],
        dots=[
            Dot(each.mark, axis.at(len(each.numbers) - 1) * 100 / WIDTH, y(last))
            for each in series
            if (last := each.numbers[-1]) is not None
        ],
        y_ticks=[Tick(f"{_short(step * n)}{unit}", y(step * n)) for n in range(count + 1)],
        x_ticks=_ticks(axis),
        stops=_stops(axis, series),
    )


def _line(axis: Axis, series: Series, y: Callable[[float], float]) -> str:
    """Return the path through the heights of the points that have any; a lone one is a dot."""
    pen, path = "M", []
    for index, number in enumerate(series.numbers):
        if number is None:
            pen = "M"
            continue
        path.append(f"{pen}{axis.at(index):g} {y(number):g}{'h0' if pen == 'M' else ''}")
        pen = "L"
    return "".join(path)


def bars(axis: Axis, up: Series, down: Series) -> Chart | None:
    """Draw a bar up and a bar down for each point; None if no number is above zero.

    A number that is not shown is a short bar with a different look. Each side is as high as its
    longest bar needs.
    """
    highest = [max((n for n in each.numbers if n), default=0) for each in (up, down)]
    if not any(highest):
        return None
    step, _ = _scale(max(highest))
    above, below = (max(1, -int(-most // step)) for most in highest)
    per = HEIGHT / (step * (above + below))
    zero = round(HEIGHT * above / (above + below), 1)
    marks = [
        mark
        for each, sign in ((up, -1), (down, 1))
        for mark in (
            Mark(each.mark, _bars(axis, each, zero, sign * per, few=False)),
            Mark(f"{each.mark} few", _bars(axis, each, zero, sign, few=True)),
        )
    ]
    return Chart(
        keys=[Key(each.name, each.mark, "bar", each.words[-1]) for each in (up, down)],
        marks=[mark for mark in marks if mark.path],
        dots=[],
        y_ticks=[
            Tick(_short(abs(n) * step), round(zero - n * step * per, 1))
            for n in range(-below, above + 1)
        ],
        x_ticks=_ticks(axis),
        stops=_stops(axis, (up, down)),
    )


def _bars(axis: Axis, series: Series, zero: float, per: float, *, few: bool) -> str:
    width = round(0.7 * WIDTH / axis.slots, 1)
    path = []
    for index, number in enumerate(series.numbers):
        if (number is None) is few and number != 0:
            height = round((FEW_HEIGHT if number is None else number) * per, 1)
            left = round(axis.at(index) - width / 2, 1)
            path.append(f"M{left:g} {zero:g}v{height:g}h{width:g}V{zero:g}z")
    return "".join(path)


def _scale(highest: float) -> tuple[int, int]:
    """Return the step of an axis, five or more, and how many steps it has."""
    step = next(step for step in _steps() if step * 4 >= highest)
    return step, max(2, -int(-highest // step))


def _steps() -> Iterator[int]:
    power = 1
    while True:
        yield from (5 * power, 10 * power, 25 * power)
        power *= 10


def _short(number: int) -> str:
    """Return a number with few digits."""
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if number >= 10 * unit or (number >= unit and number % (unit // 10) == 0):
            return f"{number / unit:g}{name}"
    return str(number)


def _ticks(axis: Axis) -> list[Tick]:
    """Return the ticks below the plot; every second one is minor, counted from the last."""
    thin = [*axis.ticks.items()][:: -1 * -(-len(axis.ticks) // TICKS)][::-1]
    last = len(thin) - 1
    roles = {0: "first", last: "last"}
    return [
        Tick(
            words,
            round(axis.at(index) * 100 / WIDTH, 1),
            roles.get(n, "middle") + (" minor" if (last - n) % 2 else ""),
        )
        for n, (index, words) in enumerate(thin)
    ]


def _stops(axis: Axis, series: Sequence[Series]) -> list[str]:
    at = range(len(axis.names) - 1, -1, -axis.per_stop)
    return [f"{axis.names[n]}: {'; '.join(_say(series, n))}" for n in [*at][::-1]]


def _say(series: Sequence[Series], n: int) -> Iterator[str]:
    return (f"{each.name} {each.words[n]}" for each in series if n < len(each.words))
