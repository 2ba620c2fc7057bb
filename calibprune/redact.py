"""Makes untrusted text fit for a terminal, a log or a record: one line, no secrets, no control characters.

Error messages come from storage libraries, servers, models and untrusted files. They may contain signed addresses,
and escape sequences that would control a terminal.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

HIDDEN = "***"
MIN_SECRET_CHARACTERS = 8
"""Shortest value of an environment variable that is hidden; a shorter one may be part of ordinary words."""

SECRET_NAME = re.compile(
    r"SECRET|TOKEN(?!IZ|S\b|S_)|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|SIGNATURE|CONNECTION_STRING", re.I
)  # fmt: skip
_USER = re.compile(
    r"(?<=://)[^/@:\s'\"<>]*:[^/@\s'\"<>]+@|(?:(?<=http://)|(?<=https://))[^/@\s'\"<>]+@"
)
"""User part of an address: with a password, or of a web address, where a name alone may be a token. Elsewhere a name
alone is a container or a user."""
_PARAMETER = re.compile(
    r"([?&;][^=&;?\s'\"<>]{0,100}"
    r"(?:sig|token|key|secret|credential|password)[^=&;?\s'\"<>]{0,100}=)[^&;\s'\"<>)]+", re.I
)  # fmt: skip
_AUTHORIZATION = re.compile(
    r"\b(bearer\s+|authorization['\"]?\s*[:=]\s*['\"]?(?:basic|token)\s+|signature=)[\w+/=.~-]{16,}", re.I
)  # fmt: skip
_BEARER = re.compile(r"\bbearer\s+(?=[\w+/=.~-]*\d)[\w+/=.~-]{16,}", re.I)
_ASSIGNED = re.compile(
    r"(\w*(?:secret|password|passwd|(?:session|security)[_-]?token|access_?key|api_?key|account_?key|private_?key)\w*['\"]?\s*[=:]\s*['\"]?)"
    r"[^\s,;&'\")}<]+",
    re.I,
)  # fmt: skip
_TOKEN_ASSIGNED = re.compile(r"(?<![a-z])((?:\w+_)?token['\"]?\s*=\s*['\"]?)[\w+/=.~-]{8,}", re.I)
_PRIVATE_KEY = re.compile(
    r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(-----END [A-Z ]*PRIVATE KEY-----|$)", re.S
)
_KNOWN_SHAPE = re.compile(
    r"\b(?:(?:AKIA|ASIA)[A-Z0-9]{16}|hf_[A-Za-z0-9]{24,}|gh[pousr]_[A-Za-z0-9]{24,}|github_pat_\w{24,}|"
    r"sk-[A-Za-z0-9_-]{32,}|AIza[\w-]{35}|xox[abprs]-[\w-]{20,}|glpat-[\w-]{20,})\b"
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CONTROL_IN_LINES = re.compile(_CONTROL.pattern.replace("\x00-\x1f", "\x00-\x09\x0b-\x1f"))


def without_secrets(text: str) -> str:
    """Returns the text with `***` in place of passwords and signatures in addresses, values that are assigned to a key
    or password, well-known kinds of tokens, and values of environment variables with the name of a secret."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    text = _USER.sub(f"{HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\1{HIDDEN}", text)
    text = _AUTHORIZATION.sub(rf"\1{HIDDEN}", text)
    text = _ASSIGNED.sub(rf"\1{HIDDEN}", text)
    text = _TOKEN_ASSIGNED.sub(rf"\1{HIDDEN}", text)
    text = _PRIVATE_KEY.sub(rf"\1{HIDDEN}", text)
    return _KNOWN_SHAPE.sub(HIDDEN, text)


def holds_credential(text: str) -> bool:
    """Returns whether a text contains a password or signature in an address, a well-known kind of token, or the value
    of a secret environment variable. Text that merely looks like an assignment to a key is allowed."""
    return shaped_as_credential(text) or any(one in text for one in _secrets())


def shaped_as_credential(text: str) -> bool:
    """Returns the same as `holds_credential`, but without looking for the values of environment variables."""
    patterns = (_USER, _PARAMETER, _BEARER, _KNOWN_SHAPE, _PRIVATE_KEY)
    return any(one.search(text) for one in patterns)


def plain(text: str) -> str:
    """Returns the text as one line without secrets, with control and writing-direction characters escaped."""
    return _escaped(_CONTROL, without_secrets(text))


def plain_lines(text: str) -> str:
    """Returns several lines, such as a traceback, made safe like `plain`."""
    return _escaped(_CONTROL_IN_LINES, without_secrets(text))


def one_line(error: object, most: int = 300) -> str:
    """Returns an error's message in at most `most` characters, or its kind where the message is empty."""
    text = " ".join(without_secrets(str(error)).split()) or type(error).__name__
    return plain(text)[:most]


def _escaped(control: re.Pattern[str], text: str) -> str:
    return control.sub(lambda found: ascii(found[0])[1:-1], _COLOUR.sub("", text))


def _secrets() -> Iterator[str]:
    """Yields the values to hide, the longest first, since one may be part of another."""
    found = {
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= MIN_SECRET_CHARACTERS and not _is_path(value)
    }
    yield from sorted(found | {quote(value, safe="") for value in found}, key=len, reverse=True)


def _is_path(value: str) -> bool:
    """Returns whether a value is an existing path: the place of a secret is not a secret."""
    return value.startswith(("/", "~")) and Path(value).expanduser().exists()
