"""Rounds numbers to whole ones so that their sum, weighted by sizes, stays nearly the same."""

import math
from collections import defaultdict
from collections.abc import Sequence

MAX_MOVED = 4
"""Maximum count of numbers of one size whose rounding is changed after the largest remainders decided it."""
MAX_STATES = 1000
"""Maximum number of partial solutions that the search keeps."""


def round_to_whole(wanted: Sequence[float], sizes: Sequence[int], tolerance: float) -> list[int]:
    """Rounds each of `wanted` down or up so that sum(size * number) misses sum(size * wanted) by at most `tolerance`.

    The largest remainders are rounded up while at least half of a size is left to distribute. If the sum then misses by
    more than `tolerance`, the rounding of a few numbers is changed: to the solution within `tolerance` that has the
    least sum of size * (number - wanted)^2, or without one to the nearest that was found. Of two numbers of equal size
    the one that is wanted larger never becomes smaller.
    """
    lows = [math.floor(number + 1e-6) for number in wanted]
    rests = [max(0.0, number - low) for number, low in zip(wanted, lows, strict=True)]
    left = math.fsum(size * rest for size, rest in zip(sizes, rests, strict=True))
    order = [i for i in sorted(range(len(rests)), key=lambda i: -rests[i]) if rests[i] > 1e-6]
    by_size: dict[int, list[int]] = defaultdict(list)
    ups: dict[int, int] = defaultdict(int)
    for i in order:
        size = sizes[i]
        if ups[size] == len(by_size[size]) and left >= size / 2:  # all before it were rounded up
            ups[size], left = ups[size] + 1, left - size
        by_size[size].append(i)
    if abs(left) > tolerance:
        ups |= _correct_counts(by_size, rests, ups, left, tolerance)
    for size, members in by_size.items():
        for i in members[: ups[size]]:
            lows[i] += 1
    return lows


def _correct_counts(
    by_size: dict[int, list[int]],
    rests: Sequence[float],
    ups: dict[int, int],
    left: float,
    tolerance: float,
) -> dict[int, int]:
    """Returns how many numbers of each size to round up, changed by a few so that less than `tolerance` is left."""
    ways: dict[int, tuple[float, dict[int, int]]] = {0: (0.0, {})}  # added size -> cost, counts
    for size, members in by_size.items():
        now = ups[size]
        found: dict[int, tuple[float, dict[int, int]]] = {}
        for count in range(max(0, now - MAX_MOVED), min(len(members), now + MAX_MOVED) + 1):
            moved = members[min(now, count) : max(now, count)]
            cost = math.fsum(size * (1 - 2 * rests[i]) for i in moved)
            cost = cost if count > now else -cost
            for added, (before, counts) in ways.items():
                place = added + (count - now) * size
                if place not in found or before + cost < found[place][0]:
                    found[place] = before + cost, counts | {size: count}
        ways = dict(sorted(found.items(), key=lambda way: (way[1][0], way[0]))[:MAX_STATES])
    best = min(ways, key=lambda added: (max(tolerance, abs(left - added)), ways[added][0], added))
    return ways[best][1]
