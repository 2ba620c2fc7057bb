"""Whole numbers for what is wanted in fractions, so that their mean, weighted by sizes, stays what was wanted."""

import math
from collections import defaultdict
from collections.abc import Sequence

REACH = 4
"""Most numbers of one size that are moved from where the largest remainders leave them."""
STATES = 1000
"""Ways of moving numbers that are looked at together."""


def whole_numbers(wanted: Sequence[float], sizes: Sequence[int], enough: float) -> list[int]:
    """Each of `wanted` rounded down or up, so that sum(size * number) misses sum(size * wanted) by at most `enough`.

    The largest remainders are rounded up, as long as half of a size or more is owed. Where that misses by more, a few
    numbers are moved: of the ways that miss by no more than `enough` the one with the least sum of size * (number -
    wanted)^2, without such the nearest of those looked at. Of two equal sizes the one of which more is wanted never
    gets less.
    """
    lows = [math.floor(number + 1e-6) for number in wanted]
    rests = [max(0.0, number - low) for number, low in zip(wanted, lows, strict=True)]
    owed = math.fsum(size * rest for size, rest in zip(sizes, rests, strict=True))
    order = [i for i in sorted(range(len(rests)), key=lambda i: -rests[i]) if rests[i] > 1e-6]
    by_size: dict[int, list[int]] = defaultdict(list)
    ups: dict[int, int] = defaultdict(int)
    left = owed
    for i in order:
        size = sizes[i]
        if ups[size] == len(by_size[size]) and left >= size / 2:  # none before it was left out
            ups[size], left = ups[size] + 1, left - size
        by_size[size].append(i)
    if abs(left) > enough:
        ups |= _moved(by_size, rests, ups, left, enough)
    for size, members in by_size.items():
        for i in members[: ups[size]]:
            lows[i] += 1
    return lows


def _moved(
    by_size: dict[int, list[int]],
    rests: Sequence[float],
    ups: dict[int, int],
    left: float,
    enough: float,
) -> dict[int, int]:
    """How many of each size are rounded up, when a few are moved because too much is left."""
    ways: dict[int, tuple[float, dict[int, int]]] = {0: (0.0, {})}  # sizes added -> costs, counts
    for size, members in by_size.items():
        now = ups[size]
        found: dict[int, tuple[float, dict[int, int]]] = {}
        for count in range(max(0, now - REACH), min(len(members), now + REACH) + 1):
            moved = members[min(now, count) : max(now, count)]
            cost = math.fsum(size * (1 - 2 * rests[i]) for i in moved)
            cost = cost if count > now else -cost
            for added, (before, counts) in ways.items():
                place = added + (count - now) * size
                if place not in found or before + cost < found[place][0]:
                    found[place] = before + cost, counts | {size: count}
        ways = dict(sorted(found.items(), key=lambda way: (way[1][0], way[0]))[:STATES])
    best = min(ways, key=lambda added: (max(enough, abs(left - added)), ways[added][0], added))
    return ways[best][1]
