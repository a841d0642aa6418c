"""Charts of measured figures, as SVG or PNG by the file's suffix: bars, dots, lines. matplotlib draws them.

Invariant: the same figures give the same SVG, byte for byte with one version of matplotlib, so that a chart under
version control changes only with its figures. Nothing of matplotlib's global state stays changed, and it is imported
only when a chart is asked for: it is an extra.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stemcache.prefixtree.errors import StemcacheError
from stemcache.ragcache.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY: Final = "#9aa1a8"
BLUE: Final = "#0072b2"
GREEN: Final = "#00806a"
_LINES: Final = (BLUE, "#d98a00", GREEN, "#a8558a", "#c2410c")  # Okabe and Ito's, a little darker, as on the live page

# Dark on white whatever the viewer's own background is; text as text, so that it can be searched and stays small.
_STYLE: Final[dict[Any, Any]] = {
    "svg.hashsalt": "stemcache",
    "svg.fonttype": "none",
    "font.size": 10.0,
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "savefig.facecolor": "white",
    "savefig.dpi": 150.0,
}
_METADATA: Final[dict[str, dict[str, str | None]]] = {  # without the date and the version of what drew it
    ".svg": {"Date": None, "Creator": None},
    ".png": {"Software": None},
}


class ChartError(StemcacheError):
    """A chart cannot be written as asked; the message says how it can."""


@dataclass(frozen=True, slots=True)
class Bar:
    """`low` and `high`: the ends of the whisker. `text` stands behind both."""

    label: str
    value: float
    low: float
    high: float
    text: str
    color: str = BLUE


@dataclass(frozen=True, slots=True)
class Lines:
    """One diagram on two logarithmic axes. lines: by name, points (x, y), all above 0."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def require_charts(path: Path) -> None:
    """To be asked before the work whose figures are to be drawn.

    Raises ChartError for a suffix other than .svg and .png, MissingExtraError without matplotlib.
    """
    if path.suffix.lower() not in _METADATA:
        raise ChartError(f"a chart is written as .svg or .png, and {path.name!r} is neither: name the file so")
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "charts")


def draw_bars(panels: Mapping[str, Sequence[Bar]], path: Path) -> None:
    """A block of horizontal bars for each title. Raises as `require_charts` does, and OSError."""
    heights = [len(bars) + 1.8 for bars in panels.values()]
    with _figure(path, 7.6, 0.21 * sum(heights)) as figure:
        blocks = figure.subplots(len(panels), 1, squeeze=False, sharex=False, height_ratios=heights)[:, 0]
        for block, (title, bars) in zip(blocks, panels.items(), strict=True):
            rows = range(len(bars))
            block.set_title(" ")  # keeps room for the title, which begins where the labels do and not above the bars
            block.annotate(
                title,
                (0, 1),
                (8, 6),
                xycoords=("figure fraction", "axes fraction"),
                textcoords="offset points",
                weight="bold",
                size="medium",
                in_layout=False,
            )
            block.barh(rows, [bar.value for bar in bars], 0.74, color=[bar.color for bar in bars])
            block.hlines(rows, [bar.low for bar in bars], [bar.high for bar in bars], color="black", linewidth=1)
            for row, bar in zip(rows, bars, strict=True):
                block.annotate(
                    bar.text, (max(bar.value, bar.high), row), (4, 0), textcoords="offset points", va="center"
                )
            block.set_yticks(rows, [bar.label for bar in bars])
            block.set_xlim(0, 1.12 * max(1e-9, *(max(bar.value, bar.high) for bar in bars)))
            block.invert_yaxis()
            block.tick_params(left=False, bottom=False, labelbottom=False)
            block.spines[["left", "bottom"]].set_visible(False)


def draw_dots(title: str, x: str, y: str, points: Sequence[tuple[float, float]], path: Path) -> None:
    """One dot a point, on axes that begin at 0. Raises as `require_charts` does, and OSError."""
    with _figure(path, 6.4, 3.6) as figure:
        axes = figure.subplots()
        axes.set_title(title)
        axes.scatter(
            [each[0] for each in points], [each[1] for each in points], 28, BLUE, alpha=0.5, lw=0, clip_on=False
        )
        axes.set_xlim(0, 1.05 * max([each[0] for each in points] + [1]))
        axes.set_ylim(0, 1.05 * max([each[1] for each in points] + [1]))
        _label(axes, x, y)


def draw_lines(panels: Sequence[Lines], path: Path) -> None:
    """The diagrams side by side. Raises as `require_charts` does, and OSError."""
    with _figure(path, 5.6 * len(panels), 3.4) as figure:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.set_title(panel.title)
            axes.set_xscale("log")
            axes.set_yscale("log")
            for i, (name, line) in enumerate(panel.lines.items()):
                color, marker = _LINES[i % len(_LINES)], "os^Dv"[i % 5]
                axes.plot([x for x, _ in line], [y for _, y in line], color=color, marker=marker, ms=4, label=name)
            _label(axes, panel.x, panel.y)
            axes.minorticks_off()
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.set_ylim(*_decades([y for line in panel.lines.values() for _, y in line]))
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True)


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The powers of ten around them, one decade at least."""
    low = math.floor(math.log10(min(values)))
    return 10.0**low, 10.0 ** max(low + 1, math.ceil(math.log10(max(values))))


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, which is written when the block ends well."""
    require_charts(path)
    from matplotlib import rcParams
    from matplotlib.figure import Figure  # not pyplot, which keeps its figures and looks for a screen
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    before = {name: rcParams[name] for name in _STYLE}
    rcParams.update(_STYLE)  # rc_context would ask for the backend, and with that import pyplot
    try:
        figure = Figure((width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        yield figure
        suffix = path.suffix.lower()
        figure.savefig(path, format=suffix[1:], metadata=_METADATA[suffix])
    finally:
        rcParams.update(before)
