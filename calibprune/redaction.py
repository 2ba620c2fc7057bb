"""Text that others will read, without what looks like a credential: for the log and the journal of failures."""

import os
import re

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.I)
_SECRETS = (
    (re.compile(r"(\w[\w+.-]*://)[^/\s@'\"]+@"), r"\1"),
    (re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>]+"), r"\1"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", re.I), r"\1 ..."),
    (re.compile(r"\b(hf_|sk-|gh[pousr]_|xox[a-z]-)[\w-]{10,}|\b(AKIA|ASIA)[A-Z0-9]{12,}"), "..."),
    (
        re.compile(
            r"((?:\b|_)\w*(?:token|secret|password|signature|credential|api_?key|access_?key)\w*['\"]?\s*[=:]\s*)"
            r"['\"]?[^\s,;&'\")}]+",
            re.I,
        ),
        r"\1...",
    ),
)  # fmt: skip


def redacted(text: str) -> str:
    """One line without what looks like a credential, and without the values of this process's own."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name) and not value.startswith("/"):
            text = text.replace(value, "...")
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
