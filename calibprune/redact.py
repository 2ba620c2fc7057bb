"""Text that others wrote, made fit for a terminal, a log or a record: one line, no secrets, no control characters.

Error messages come from storage libraries, servers, models and files of strangers. They may hold signed addresses,
and escape sequences that would move a terminal's cursor.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

HIDDEN = "***"
MIN_SECRET_CHARACTERS = 8
"""Characters of a secret; a shorter value of the environment would be found in words."""

SECRET_NAME = re.compile(
    r"SECRET|TOKEN(?!IZ|S\b|S_)|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|SIGNATURE|CONNECTION_STRING", re.I
)  # fmt: skip
_USER = re.compile(
    r"(?<=://)[^/@:\s'\"<>]*:[^/@\s'\"<>]+@|(?:(?<=http://)|(?<=https://))[^/@\s'\"<>]+@"
)
"""With a password, or to a web server, where a name alone may be a token; in others it is a container or a user."""
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
    """The text with `***` for passwords and signatures in addresses, for what a message says a key or password to be,
    for what has the shape of a well-known kind of token, and for the values of this process's environment variables
    whose names say that they are secret."""
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
    """Whether there is a password or signature in an address, a token of a well-known kind, or a secret variable's
    value in it; what merely reads as if a key were named is let pass."""
    return shaped_as_credential(text) or any(one in text for one in _secrets())


def shaped_as_credential(text: str) -> bool:
    """The same, but for the values of this process's variables."""
    patterns = (_USER, _PARAMETER, _BEARER, _KNOWN_SHAPE, _PRIVATE_KEY)
    return any(one.search(text) for one in patterns)


def plain(text: str) -> str:
    """One line without secrets; control characters, and those that turn the direction of writing, are written out."""
    return _written_out(_CONTROL, without_secrets(text))


def plain_lines(text: str) -> str:
    """The same of several lines, such as a traceback."""
    return _written_out(_CONTROL_IN_LINES, without_secrets(text))


def one_line(error: object, most: int = 300) -> str:
    """What an error says, in at most so many characters; its kind where it says nothing."""
    text = " ".join(without_secrets(str(error)).split()) or type(error).__name__
    return plain(text)[:most]


def _written_out(control: re.Pattern[str], text: str) -> str:
    return control.sub(lambda found: ascii(found[0])[1:-1], _COLOUR.sub("", text))


def _secrets() -> Iterator[str]:
    """Longest first: one may be part of another."""
    found = {
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= MIN_SECRET_CHARACTERS and not _is_path(value)
    }
    yield from sorted(found | {quote(value, safe="") for value in found}, key=len, reverse=True)


def _is_path(value: str) -> bool:
    """Where a secret lies is none."""
    return value.startswith(("/", "~")) and Path(value).expanduser().exists()
