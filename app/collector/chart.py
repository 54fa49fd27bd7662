"""The geometry of the page's charts, as SVG that needs neither a script nor a style. Pure.

A plot is stretched to whatever width there is: its paths have ``WIDTH`` units from left to right,
and a pixel for each unit from top to bottom. Words stand beside it, at percentages, so that they
are never stretched. A number that is not told is a gap.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise

WIDTH = 1000
HEIGHT = 200
LINE_HEIGHT = 17
"""The pixels from one label to the next that can be read."""
MONTHS = 3
"""So many beginnings of months are enough to tell where in time one is."""
FEW_HEIGHT = 4
"""The pixels of a bar whose number is not told."""


@dataclass(frozen=True)
class Series:
    """A name, the class of its marks, and a number or None for each day."""

    name: str
    mark: str
    numbers: Sequence[float | None]


@dataclass(frozen=True)
class Mark:
    """A path, and the class that says how it looks."""

    mark: str
    path: str


@dataclass(frozen=True)
class Label:
    """Words at a height, in the look of the marks that they are about; None where they are not."""

    text: str
    mark: str
    y: float
    dot: float | None


@dataclass(frozen=True)
class Tick:
    """A value on an axis: its words, and where it stands, in pixels (y) or percent (x)."""

    text: str
    at: float
    minor: bool = False
    """Left out where there is little room."""


@dataclass(frozen=True)
class Chart:
    """All that the template draws."""

    marks: list[Mark]
    labels: list[Label]
    y_ticks: list[Tick]
    x_ticks: list[Tick]
    height: int = HEIGHT


def lines(days: Sequence[date], series: Sequence[Series], *, unit: str = "") -> Chart:
    """Draw a line for each series, from zero, labelled at its end."""
    top, steps = _scale(max((n for each in series for n in each.numbers if n), default=0))

    def y(number: float) -> float:
        return round(HEIGHT * (1 - number / top), 1)

    xs = [_x(index, len(days)) for index in range(len(days))]
    marks = [Mark(each.mark, _line(xs, [*map(y, _known(each))], each)) for each in series]
    ends = [(each, y(known[-1])) for each in series if (known := _known(each))]
    return Chart(
        marks=[mark for mark in marks if mark.path],
        labels=_spread([(each, end, each.numbers[-1] is not None) for each, end in ends]),
        y_ticks=[Tick(f"{step:,}{unit}", y(step)) for step in steps],
        x_ticks=_dates(days),
    )


def _known(series: Series) -> list[float]:
    return [number for number in series.numbers if number is not None]


def _x(index: int, days: int) -> float:
    return round(WIDTH * index / (days - 1), 1) if days > 1 else float(WIDTH)


def _line(xs: Sequence[float], ys: Sequence[float], series: Series) -> str:
    """Return the path through the heights of the days that have any; a lone day is a dot."""
    heights, pen, path = iter(ys), "M", []
    for x, number in zip(xs, series.numbers, strict=True):
        if number is None:
            pen = "M"
            continue
        path.append(f"{pen}{x:g} {next(heights):g}{'h0' if pen == 'M' else ''}")
        pen = "L"
    return "".join(path)


def _scale(highest: float) -> tuple[int, list[int]]:
    """Return the top of an axis and its steps: fives or more, as no number below is told."""
    step = next(step for step in _steps() if step * 4 >= highest)
    count = max(2, -int(-highest // step))
    return step * count, [step * n for n in range(count + 1)]


def _steps() -> Iterator[int]:
    power = 1
    while True:
        yield from (5 * power, 10 * power, 25 * power)
        power *= 10


def _spread(ends: Sequence[tuple[Series, float, bool]]) -> list[Label]:
    """Move labels apart that would cover one another, and keep them on the chart."""
    placed: list[Label] = []
    floor = float(HEIGHT)
    for each, end, is_last in sorted(ends, key=lambda told: -told[1]):
        at = min(end, floor)
        floor = at - LINE_HEIGHT
        placed.append(Label(each.name, each.mark, round(at, 1), end if is_last else None))
    over = max(0.0, -min((label.y for label in placed), default=0.0))
    return [Label(label.text, label.mark, label.y + over, label.dot) for label in placed]


def bars(days: Sequence[date], up: Series, down: Series) -> Chart:
    """Draw a bar up and one down for each day; what is not told is short, in a look of its own."""
    both = [number for each in (up, down) for number in _known(each)]
    top, steps = _scale(max(both, default=0))
    middle = HEIGHT / 2
    per = middle / top
    marks = [
        mark
        for each, sign in ((up, -1), (down, 1))
        for mark in (
            Mark(each.mark, _bars(each.numbers, middle, sign * per, few=False)),
            Mark(f"{each.mark} few", _bars(each.numbers, middle, sign, few=True)),
        )
    ]
    heights = [(step, sign) for sign in (-1, 1) for step in steps[:: len(steps) - 1]]
    ticks = {round(middle + sign * step * per, 1): f"{step:,}" for step, sign in heights}
    return Chart(
        marks=[mark for mark in marks if mark.path],
        labels=[
            Label(up.name, up.mark, round(middle - LINE_HEIGHT, 1), None),
            Label(down.name, down.mark, round(middle + LINE_HEIGHT, 1), None),
        ],
        y_ticks=[Tick(words, at) for at, words in ticks.items()],
        x_ticks=_dates(days, in_slots=True),
    )


def _bars(numbers: Sequence[float | None], zero: float, per: float, *, few: bool) -> str:
    slot = WIDTH / len(numbers)
    width = round(slot * 0.7, 1)
    path = []
    for index, number in enumerate(numbers):
        if (number is None) is few and number != 0:
            height = round((FEW_HEIGHT if number is None else number) * per, 1)
            path.append(
                f"M{round((index + 0.15) * slot, 1):g} {zero:g}v{height:g}h{width:g}V{zero:g}z"
            )
    return "".join(path)


def _dates(days: Sequence[date], *, in_slots: bool = False) -> list[Tick]:
    """Return the months that begin in ``days``, or where there are fewer than three, some days."""
    months = [n for n, (before, day) in enumerate(pairwise(days), 1) if before.month != day.month]
    at = (
        months
        if len(months) >= MONTHS
        else [*range(len(days) - 1, -1, -max(1, len(days) // 5))][::-1]
    )
    thin = at[:: -(-len(at) // 6)]
    count = len(days)

    def percent(index: int) -> float:
        x = (index + 0.5) / count * WIDTH if in_slots else _x(index, count)
        return round(x * 100 / WIDTH, 1)

    return [
        Tick(_day(days[index], with_day=at is not months), percent(index), bool(n % 2))
        for n, index in enumerate(thin)
    ]


def _day(day: date, *, with_day: bool) -> str:
    if with_day:
        return f"{day.day} {day:%b}"
    return f"{day:%b %Y}" if day.month == 1 else f"{day:%b}"
