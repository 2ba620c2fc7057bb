"""How the report writes numbers: counts, shares, perplexities, durations, sizes."""

import math

NO_VALUE, TIMES, MINUS = "\u2013", "\u00d7", "\u2212"


def count(value: float) -> str:
    """1234567 -> "1,234,567"."""
    return f"{value:,.0f}"


def compact(value: float) -> str:
    """134515008 -> "134.5 M"."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= factor:
            return f"{value / (1e3 if letter == 'k' else factor):.4g} {letter}"
    return count(value)


def percent(share: float | None) -> str:
    """0.5 -> "50.0%"."""
    return NO_VALUE if share is None else f"{100 * share:.1f}%"


def perplexity(value: float | None) -> str:
    """12.345 -> "12.35"; four figures and more without decimals."""
    if value is None:
        return NO_VALUE
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 999.995 else f"{value:,.0f}"


def ratio(value: float | None) -> str:
    """Three significant figures: a relative error, a factor."""
    if value is None:
        return NO_VALUE
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".removesuffix(".")


def change(dense: float | None, pruned: float | None) -> str:
    """What pruning made of a perplexity: "+22.8%", or "×3.40" from a doubling on."""
    if dense is None or pruned is None or not math.isfinite(pruned / dense):
        return NO_VALUE
    if pruned >= 2 * dense:
        return TIMES + ratio(pruned / dense)
    return f"{100 * (pruned / dense - 1):+.1f}%".replace("-", MINUS)


def duration(seconds: float) -> str:
    """0.42 -> "0.42 s", 75 -> "1 min 15 s", 3720 -> "1 h 2 min"."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def size(number_of_bytes: float) -> str:
    """1610612736 -> "1.5 GiB"."""
    value = float(number_of_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1023.95:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"
