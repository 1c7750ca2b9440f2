"""Charts as inline SVG that takes the page's font and text colour, light or dark."""

import io
from itertools import cycle, islice
from typing import Any, Dict, Mapping, Sequence, Tuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Readable on white and on black.
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#06b6d4", "#84cc16")
ROLES = dict(zip(("student", "vanilla", "teacher"), COLOURS))  # the same in every report
INK = "#010203"  # stands for the page's text colour
STYLE: Dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
}


class Chart:
    """One small chart.

    Args:
        title (str): above it; also what keeps the ids of its SVG apart from other charts'.
        x_label (str): below it.
    """

    def __init__(self, title: str, x_label: str = "") -> None:
        self.style = {**STYLE, "svg.hashsalt": title}
        with matplotlib.rc_context(self.style):
            self.figure = Figure(figsize=(3.8, 2.5), layout="constrained")
            self.figure.patch.set_alpha(0)
            self.axes = self.figure.add_subplot(facecolor="none")
            self.axes.set_title(title)
            self.axes.set_xlabel(x_label)

    def svg(self) -> str:
        """The chart as an element for HTML."""
        out = io.StringIO()
        with matplotlib.rc_context(self.style):
            self.figure.savefig(out, format="svg", metadata={"Date": None})
        text = out.getvalue()
        return text[text.index("<svg") :].replace(INK, "currentColor")


def colours(labels: Sequence[str], taken: int = 0) -> Mapping[str, str]:
    """A colour for each label: a role's own; others in order, after the first `taken` ones."""
    free = islice(cycle(COLOURS), max(taken, len(ROLES)), None)
    return {label: ROLES.get(label) or next(free) for label in labels}


def lines(
    title: str,
    series: Mapping[str, Tuple[Sequence[float], Sequence[float]]],
    colour: Mapping[str, str],
    levels: Mapping[str, float],
) -> str:
    """Curves over iterations.

    Args:
        title (str): what the values are.
        series (mapping): label -> iterations and values; few values are marked.
        colour (mapping): label -> colour.
        levels (mapping): label -> value that holds at all iterations, drawn dashed.
    """
    chart = Chart(title, "iteration")
    for label, (x, y) in series.items():
        marker = "o" if len(x) < 12 else None
        chart.axes.plot(x, y, color=colour[label], linewidth=1.2, marker=marker, markersize=3)
    for label, value in levels.items():
        chart.axes.axhline(value, color=colour[label], linewidth=1.2, linestyle="--")
    chart.axes.set_xlim(left=0)
    chart.axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return chart.svg()


def histogram(title: str, values: np.ndarray, colour: str) -> str:
    """How many of the values lie where in [-1, 1], in steps of 0.05."""
    chart = Chart(title, "SSIM")
    chart.axes.hist(values, bins=np.linspace(-1, 1, 41).tolist(), color=colour)
    chart.axes.set_xlim(min(0.0, float(values.min())) - 0.05, 1)
    return chart.svg()


def bars(
    title: str,
    groups: Sequence[str],
    values: Mapping[str, Sequence[float]],
    colour: Mapping[str, str],
) -> str:
    """A group of bars for each of `groups`, a bar for each label."""
    chart = Chart(title)
    width = 0.8 / len(values)
    for place, (label, heights) in enumerate(values.items()):
        left = np.arange(len(groups)) - 0.4 + width * (place + 0.5)
        chart.axes.bar(left, heights, width, color=colour[label])
    long = max(map(len, groups)) > 5
    chart.axes.set_xticks(
        range(len(groups)), groups, rotation=30 if long else 0, ha="right" if long else "center"
    )
    return chart.svg()
