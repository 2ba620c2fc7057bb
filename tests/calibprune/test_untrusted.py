"""Untrusted patterns and templates end in bounded time and memory, with one line."""

import re
import time

import pytest

from calibprune import untrusted
from calibprune.errors import UserError
from calibprune.untrusted import check_template, limited, matching

NAMES = tuple(f"model.layers.{index}.mlp.down_proj" for index in range(12))
CHATS = [[{"role": "user", "content": "hello"}]]


def test_what_a_function_returns_comes_back():
    assert limited(divmod, 7, 2, seconds=60) == [3, 1]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        limited(divmod, 7, 0, seconds=60)


def test_a_function_that_does_not_end_is_stopped():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="no end within 2 s"):
        limited(time.sleep, 600, seconds=2)
    assert time.monotonic() - start < 300


def test_a_function_gets_so_much_memory_and_no_more():
    assert limited(bytes.count, bytes(1 << 20), b"1", seconds=60, memory_bytes=1 << 28) == 0
    with pytest.raises(MemoryError):
        limited(bytearray, 1 << 29, seconds=60, memory_bytes=1 << 28)


def test_a_process_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match="its process ended with -6"):
        limited(__import__("os").abort, seconds=60)


@pytest.mark.parametrize("expression", [r"layers\.1", r"\.(3|11)\.", "^model", "nothing", ""])
def test_expressions_match_as_re_has_them(expression):
    expected = {name for name in NAMES if re.search(expression, name)}
    assert matching("prune.keep", expression, NAMES) == expected


def test_an_expression_that_does_not_end_is_named(monkeypatch):
    monkeypatch.setattr(untrusted, "SECONDS", 1.0)
    expression = r"^([a-z]|[a-z.]|.)+-$"
    with pytest.raises(UserError, match=r"^prune\.keep: the regular expression '\^\(") as error:
        matching("prune.keep", expression, NAMES)
    assert repr(expression) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "limit"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "time"),
        ("{{ 'a' * 10**10 }}", "memory"),
        (
            "{% set x = namespace(v='a') %}{% for i in range(60) %}{% set x.v = x.v + x.v %}{% endfor %}",
            "memory",
        ),
    ],
)
def test_a_template_without_an_end_is_named(monkeypatch, template, limit):
    monkeypatch.setattr(untrusted, "SECONDS", 1.0 if limit == "time" else 100.0)
    with pytest.raises(UserError, match=f"^the template of m takes too much {limit}") as error:
        check_template(template, CHATS, {}, "the template of m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["{{ bos_token }}{{ messages[0].content }}", "{{ 1 / 0 }}"])
def test_a_template_that_ends_passes(template):
    """This includes a template with an error, which the tokenizer reports better, with the prompt."""
    check_template(template, CHATS, {"bos_token": "<s>"}, "the template of m")
