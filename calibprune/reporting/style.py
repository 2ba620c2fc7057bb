"""Defines the look of the report's figures, and converts a matplotlib Figure to an <svg> element of the page.

One unit of a figure is one CSS pixel. Text stays text, and colours are CSS variables of the page, so that a figure
follows the reader's colour scheme.
"""

import io
import re
import warnings
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Shaped
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

INK, MUTED, RULE, CARD, ON_HEAT = "#1d2733", "#5a6675", "#dbe0e7", "#ffffff", "#fefefe"
DENSE, PRUNED, DROPPED = "#8793a3", "#1c6a8d", "#c4702b"
TEAL, GOLD, VIOLET, GREEN, ROSE = "#5fa8a0", "#b58d3d", "#8d6fa8", "#7d9b4e", "#b0577b"
COLOURS = {
    INK: ("ink", "#e2e7ed"),
    MUTED: ("muted", "#9ca8b6"),
    RULE: ("rule", "#2c3540"),
    CARD: ("card", "#171d24"),
    ON_HEAT: ("on-heat", "#0d1319"),
    DENSE: ("dense", "#7c8898"),
    PRUNED: ("pruned", "#62b0d4"),
    DROPPED: ("dropped", "#e0935a"),
    TEAL: ("teal", "#6dc0b3"),
    GOLD: ("gold", "#d3b062"),
    VIOLET: ("violet", "#b295ce"),
    GREEN: ("green", "#9dbb6d"),
    ROSE: ("rose", "#d17f9f"),
}
"""CSS variable and dark-scheme colour for every light-scheme colour; figures are drawn in the light ones."""
SERIES = (DENSE, PRUNED, TEAL, GOLD, VIOLET, DROPPED, GREEN, ROSE)
HEAT = ListedColormap([(*to_rgb(PRUNED), 0.07 + 0.93 * step / 255) for step in range(256)])
"""One colour with rising opacity, so that the tones suit either colour scheme."""

RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a name is not the start of a formula
    "font.sans-serif": [
        "DejaVu Sans"
    ],  # matplotlib computes widths with it; the page sets its own font
    "font.size": 12,
    "text.color": INK,
    "figure.facecolor": "none",
    "figure.constrained_layout.w_pad": 2 / 72,
    "figure.constrained_layout.h_pad": 5 / 72,
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 1,
    "xtick.color": MUTED,
    "xtick.major.size": 0,
    "xtick.major.pad": 5,
    "xtick.minor.size": 0,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "ytick.major.pad": 7,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0,
    "legend.handlelength": 0.9,
    "legend.handleheight": 0.9,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.4,
}
HALF_WIDTH, FULL_WIDTH = 440, 960
LEGEND_ROW_HEIGHT = 18
CHARACTER_WIDTH = 7
"""Width that is reserved for a character, in pixels."""
MAX_CHARACTERS = 34
"""Maximum length of a name that is not shortened."""


def canvas(title: str, width: float, height: float) -> Figure:
    """Returns an empty figure of a size in pixels. `title` is its text alternative."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    figure.set_label(title)
    return figure


def name_rows(axes: Axes, names: Iterable[str]) -> None:
    """Names the rows of a figure, the first on top."""
    labels = [shortened(name) for name in names]
    axes.set_yticks(range(len(labels)), labels, color=INK)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def heat_map(
    axes: Axes,
    tones: Float[np.ndarray, "rows columns"],
    columns: range,
    scale: tuple[float, float],
    labels: Shaped[np.ndarray, "rows columns"] | None = None,
) -> QuadMesh:
    """Draws a cell for every value, palest at the low and darkest at the high end of `scale`, blank where NaN.

    `labels` are written into the cells.
    """
    low, high = scale
    tones = np.clip(tones, low, high)
    corners = np.arange(len(columns) + 1) + columns.start - 0.5, np.arange(len(tones) + 1) - 0.5
    gap = min(1.5, 0.12 * FULL_WIDTH / len(columns))
    mesh = axes.pcolormesh(
        *corners, tones, cmap=HEAT, vmin=low, vmax=high, edgecolors=CARD, linewidth=gap
    )
    for (row, column), label in np.ndenumerate(labels) if labels is not None else ():
        hue = ON_HEAT if tones[row, column] > (low + high) / 2 else INK
        axes.text(columns[column], row, label, color=hue, size=10.5, ha="center", va="center")
    axes.spines.bottom.set_visible(False)
    return mesh


def legend(figure: Figure, entries: Iterable[tuple[str, str]]) -> None:
    """Puts a legend of (name, colour) above the figure, which grows by as many rows as it needs."""
    patches = [Patch(color=hue, label=shortened(name)) for name, hue in entries]
    widths = [35 + names_width([str(patch.get_label())]) for patch in patches]
    in_one_row = sum(widths) <= figure.bbox.width
    columns = len(patches) if in_one_row else max(1, int(figure.bbox.width / max(widths)))
    figure.legend(handles=patches, loc="outside upper left", ncols=columns)
    figure.set_figheight(
        figure.get_figheight() + LEGEND_ROW_HEIGHT / 72 * -(-len(patches) // columns)
    )


def shortened(name: str, max_characters: int = MAX_CHARACTERS) -> str:
    """Returns a name of at most `max_characters` characters, with its middle left out where it is longer."""
    if len(name) <= max_characters:
        return name
    return f"{name[: (max_characters - 1) // 2]}…{name[len(name) - max_characters // 2 :]}"


def names_width(names: Iterable[str]) -> float:
    """Estimates the width of the longest of these names, in pixels."""
    return CHARACTER_WIDTH * max((len(shortened(name)) for name in names), default=0)


def to_svg(figure: Figure, name: str) -> Markup:
    """Converts a figure to an <svg> element; equal figures give equal bytes. `name` makes its ids unique in a page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts may have it
        figure.savefig(buffer, format="svg")
    # Drop the head, which has sizes in points, metadata, and a style sheet that would apply to the whole page.
    _, _, drawing = buffer.getvalue().partition("</defs>")
    # Drop the ids of groups, which are the same in every figure.
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
    # Replace colours by the page's variables.
    for light, (variable, _) in COLOURS.items():
        drawing = drawing.replace(f": {light}", f": var(--{variable})")
    width, height = figure.bbox.width, figure.bbox.height
    head = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" class="plot" role="img" '
        'aria-label="{}" viewBox="0 0 {:g} {:g}" width="{:g}" height="{:g}">'
    ).format(figure.get_label(), width, height, width, height)
    return head + Markup(drawing.strip())
