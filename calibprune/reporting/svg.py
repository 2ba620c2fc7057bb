"""The look of the report's figures, and how a matplotlib figure becomes SVG for inside an HTML page.

One SVG unit is one CSS pixel. Text stays text, and colours are CSS variables of the page (with the
light scheme's value as fallback), so that a figure follows the reader's colour scheme.
"""

import functools
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Colour -> CSS variable. page.html.j2 gives every variable a light and a dark value.
INK, MUTED, RULE, CARD, ON_HEAT = "#1d2733", "#5a6675", "#dbe0e7", "#ffffff", "#fefefe"
DENSE, PRUNED, DROPPED = "#8793a3", "#1c6a8d", "#c4702b"
PARTS = ("#8b98a8", "#1d6b8e", "#5fa8a0", "#b58d3d", "#8d6fa8", "#c5712c", "#7d9b4e", "#b0577b")
VARIABLES = {
    INK: "ink", MUTED: "muted", RULE: "rule", CARD: "card", ON_HEAT: "on-heat",
    DENSE: "dense", PRUNED: "pruned", DROPPED: "dropped",
    **{hue: f"part-{i}" for i, hue in enumerate(PARTS)},
}  # fmt: skip

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "calibprune",
    "text.parse_math": False,  # a "$" in a name is a "$"
    "axes.formatter.use_mathtext": False,
    "font.size": 12,
    "font.sans-serif": ["DejaVu Sans"],  # what matplotlib measures with; the page sets its own face
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11.5,
    "axes.edgecolor": RULE,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 1,
    "xtick.color": MUTED,
    "xtick.labelsize": 11.5,
    "xtick.major.size": 0,
    "ytick.color": MUTED,
    "ytick.labelsize": 11.5,
    "ytick.major.size": 0,
    "ytick.major.pad": 7,
}
HALF_WIDTH, FULL_WIDTH = 464.0, 960.0
LEGEND_ROW = 19.0
TIP = "tip: "


def styled(plot: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(plot)
    def draw(*args, **kwargs) -> str:
        with matplotlib.rc_context(STYLE):
            return plot(*args, **kwargs)

    return draw


def tip(artist, text: str) -> None:
    """Gives one artist a text that shows when the reader points at it."""
    artist.set_gid(TIP + text)


def canvas(width: float, height: float) -> Figure:
    return Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place given in pixels from the figure's upper left corner."""
    w, h = figure.bbox.width, figure.bbox.height
    axes = figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))
    axes.patch.set_visible(False)
    return axes


def write(figure: Figure, left: float, top: float, text: str, **style) -> None:
    """Text at a place given in pixels from the figure's upper left corner."""
    w, h = figure.bbox.width, figure.bbox.height
    figure.text(left / w, 1 - top / h, text, va="center", **{"fontsize": 11.5, **style})


def text_width(text: str) -> float:
    """Pixels that a label may need in an ordinary sans-serif face of 11.5 px."""
    return 6.3 * len(text)


def gutter(names: Iterable[str]) -> float:
    """Pixels for a column of row names."""
    return min(230.0, max(map(text_width, names), default=0.0) + 14)


def rows(axes: Axes, names: Sequence[str]) -> None:
    """One named row after the other, the first on top."""
    axes.set_yticks(range(len(names)), [shortened(name, 34) for name in names], color=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)


def legend(figure: Figure, left: float, top: float, entries: Iterable[tuple[str, str]]) -> None:
    """(name, colour) one after the other, in as many rows as they need."""
    for name, hue, x, row in _legend_places(figure.bbox.width, left, entries):
        y = top + row * LEGEND_ROW
        swatch = place(figure, x, y - 5, 10, 10)
        swatch.set_axis_off()
        swatch.add_patch(Rectangle((0, 0), 1, 1, color=hue, linewidth=0))
        write(figure, x + 16, y, name)


def legend_height(width: float, left: float, names: Iterable[str]) -> float:
    """Pixels that a legend takes in a figure of this width."""
    places = list(_legend_places(width, left, ((name, "") for name in names)))
    return LEGEND_ROW * (places[-1][3] + 1 if places else 0)


def _legend_places(
    width: float, left: float, entries: Iterable[tuple[str, str]]
) -> Iterator[tuple[str, str, float, int]]:
    """(name, colour, left, row)."""
    x, row = left, 0
    for name, hue in entries:
        need = 16 + text_width(name)
        if x > left and x + need > width:
            x, row = left, row + 1
        yield name, hue, x, row
        x += need + 18


def shortened(name: str, most: int) -> str:
    """A name of at most `most` characters, its middle left out."""
    if len(name) <= most:
        return name
    return f"{name[: (most - 1) // 2]}…{name[len(name) - most // 2 :]}"


def serialise(figure: Figure, name: str, title: str) -> str:
    """The figure as an <svg> element; `name` makes its ids unique in a page, `title` is its alt text."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", text, flags=re.DOTALL)
    text = re.sub(rf"<g id=([\"']){TIP}(.*?)\1>", r"<g><title>\2</title>", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _variable, text)
    width, height = figure.bbox.width, figure.bbox.height
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'class="plot" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'role="img" aria-labelledby="{name}-title">\n<title id="{name}-title">{title}</title>'
    )
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1).strip()


def _variable(match: re.Match[str]) -> str:
    name = VARIABLES.get(match[2])
    return f"{match[1]}: var(--{name}, {match[2]})" if name else match[0]
