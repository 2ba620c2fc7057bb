import math

import pytest

from calibprune.reporting import units


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (units.count(1234567), "1,234,567"),
        (units.compact(9999), "9,999"),
        (units.compact(12500), "12.5 k"),
        (units.compact(134515008), "134.5 M"),
        (units.compact(8.03e9), "8.03 B"),
        (units.percent(0.5), "50.0%"),
        (units.percent(None), units.NO_VALUE),
        (units.perplexity(12.3456), "12.35"),
        (units.perplexity(43210.9), "43,211"),
        (units.perplexity(math.inf), "not finite"),
        (units.ratio(0.012345), "0.0123"),
        (units.ratio(0.5), "0.500"),
        (units.ratio(123.4), "123"),
        (units.ratio(math.nan), "not finite"),
        (units.change(10, 12.28), "+22.8%"),
        (units.change(10, 9), units.MINUS + "10.0%"),
        (units.change(10, 34), units.TIMES + "3.40"),
        (units.change(10, math.inf), units.NO_VALUE),
        (units.change(None, 10), units.NO_VALUE),
        (units.duration(0.042), "0.04 s"),
        (units.duration(59.94), "59.9 s"),
        (units.duration(59.96), "1 min 0 s"),
        (units.duration(3599), "59 min 59 s"),
        (units.duration(3599.7), "1 h 0 min"),
        (units.duration(90061), "25 h 1 min"),
        (units.size(512), "512 B"),
        (units.size(3 * 2**29), "1.5 GiB"),
        (units.size(2**40 - 1), "1.00 TiB"),
    ],
)
def test_numbers_are_written_as_expected(written, expected):
    assert written == expected
