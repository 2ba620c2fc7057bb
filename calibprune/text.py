"""Formats numbers as text, the same on the terminal, in the logs and on the report's page."""

import math

import humanize

NO_VALUE, TIMES, MINUS = "\u2013", "\u00d7", "\u2212"
NOT_FINITE = "not finite"
LETTERS = {"thousand": "k", "million": "M", "billion": "B", "trillion": "T"}


def count(number: float) -> str:
    """Formats a count: 1234567 -> "1,234,567"."""
    return f"{number:,.0f}"


def compact(number: float) -> str:
    """Formats a large number: 1234567 -> "1.2M", 134515008 -> "134.5M"; below ten thousand as `count`."""
    if number < 10_000:
        return count(number)
    value, word = humanize.intword(number, "%.1f").split(" ")
    return value + LETTERS.get(word, f" {word}")


def percent(share: float | None) -> str:
    """Formats a share: 0.5 -> "50.0%"."""
    return NO_VALUE if share is None else f"{100 * share:.1f}%"


def perplexity(value: float | None) -> str:
    """Formats a perplexity: 12.345 -> "12.35"; from a thousand on without decimals."""
    if value is None:
        return NO_VALUE
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{value:.2f}" if value < 999.995 else f"{value:,.0f}"


def ratio(value: float | None) -> str:
    """Formats a relative error or a factor to three significant digits."""
    if value is None:
        return NO_VALUE
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".removesuffix(".")


def change(before: float | None, after: float | None) -> str:
    """Formats a change: 10 and 12.28 -> "+22.8%"; from a doubling on as a factor, "×3.40"."""
    if before is None or after is None or not math.isfinite(after / before):
        return NO_VALUE
    if after >= 2 * before:
        return TIMES + ratio(after / before)
    return f"{100 * (after / before - 1):+.1f}%".replace("-", MINUS)


def duration(seconds: float) -> str:
    """Formats a duration in one unit, to two significant digits or more: "0.05 s", "95 s", "2.0 min", "2.3 h"."""
    if seconds < 0.95:
        return f"{round(seconds, 2):g} s"
    if seconds < 99.5:
        return f"{seconds:.{_decimals(seconds)}f} s"
    minutes = seconds / 60
    return f"{minutes:.{_decimals(minutes)}f} min" if minutes < 99.5 else f"{minutes / 60:.1f} h"


def pace(seconds_each: float) -> str:
    """Formats the time that each of many similar things takes: "143 s each", "2.4 s each", "250 a second"."""
    if seconds_each < 0.1:
        return f"{1 / max(seconds_each, 1e-9):.0f} a second"
    return f"{seconds_each:.{_decimals(seconds_each)}f} s each"


def _decimals(value: float) -> int:
    return 0 if value >= 9.95 else 1


def size(number_of_bytes: float | None) -> str:
    """Formats bytes: 5690831667 -> "5.3 GiB", 734003200 -> "700 MiB"; an unknown size is an empty string."""
    if number_of_bytes is None:
        return ""
    value, unit = humanize.naturalsize(number_of_bytes, binary=True, format="%.1f").split(" ")
    return f"{value if float(value) < 100 else round(float(value))} {unit}"
