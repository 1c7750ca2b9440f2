"""Charts as inline SVG. They take the font and the text colour of the page, light or dark."""

import io
from itertools import cycle
from typing import Any, Dict, Mapping, Sequence, Tuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Readable on white and on black.
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#06b6d4", "#84cc16")
INK = "#010203"  # `lines` replaces it by the page's text colour
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STYLE: Dict[Any, Any] = {
    **dict.fromkeys((*INKED, "grid.color"), INK),
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.alpha": 0.15,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}


def colours(labels: Sequence[str]) -> Dict[str, str]:
    """A colour for each label, in order."""
    return dict(zip(labels, cycle(COLOURS)))


def lines(
    title: str,
    series: Mapping[str, Sequence[Tuple[Sequence[float], Sequence[float]]]],
    colour: Mapping[str, str],
) -> str:
    """Curves over iterations, as an <svg> element.

    Args:
        title (str): what the values are.
        series (mapping): label -> iterations and values of each of its runs.
        colour (mapping): label -> colour.
    """
    out = io.StringIO()
    # the title salts the ids inside the element: two charts on one page must not share ids
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(3.8, 2.5), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        for label, (x, y) in ((label, curve) for label, run in series.items() for curve in run):
            marker = "o" if len(x) < 12 else None
            axes.plot(x, y, color=colour[label], linewidth=1.2, marker=marker, markersize=3)
        axes.set_xlabel("iteration")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
