"""Retries calls to a store after transient errors, and tells those from refusals, which are final.

The stores' own libraries (botocore, gcsfs, huggingface_hub) retry a request a few times within seconds; this module
retries for up to two minutes. Its messages contain only the URL and the kind of error, never a library's own text,
which may contain a signed address.
"""

import http.client
import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import TypeVar
from urllib.parse import urlsplit

import tenacity

from calibprune.errors import StoreUnavailable, UserError
from calibprune.redact import without_secrets

RETRY_SECONDS = 120.0
"""Time after the first attempt in which further ones may start."""
QUIET_SECONDS = 5.0
"""Time after the first attempt from which on every wait is logged."""

_TRANSIENT_STATUS = {408, 425, 429, *range(500, 600)} - {501, 505}
_TRANSIENT_CODES = {
    "SlowDown", "RequestTimeout", "IncompleteBody", "Throttling", "ThrottlingException", "RequestLimitExceeded",
    "InternalError", "ServiceUnavailable", "OperationAborted", "ConditionalRequestConflict",
}  # fmt: skip
_CREDENTIALS = {
    "s3": "the AWS environment variables, profile or role",
    "gs": "`gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "`hf auth login` or HF_TOKEN; a gated repository also wants its terms accepted",
}
_log = logging.getLogger(__name__)
T = TypeVar("T")


def retrying(
    url: str, verb: str, operation: Callable[[], T], patience_seconds: float | None = None
) -> T:
    """Returns what `operation` does, with retries after transient errors, at growing and jittered intervals.

    Raises UserError at once where access is denied, StoreUnavailable when the trouble outlasts `patience_seconds`
    (default RETRY_SECONDS), and every other error as it is.
    """
    patience = RETRY_SECONDS if patience_seconds is None else patience_seconds

    def log_wait(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        waited = state.seconds_since_start or 0.0
        if error and waited > QUIET_SECONDS:
            _log.warning("cannot %s %s: %s; retrying", verb, redacted_url(url), reason(error))

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_exponential_jitter(initial=0.25, max=20, jitter=0.5),
        stop=tenacity.stop_before_delay(patience),
        before_sleep=log_wait,
        reraise=True,
    )
    try:
        return attempts(operation)
    except Exception as error:
        if is_transient(error):
            raise StoreUnavailable(
                f"cannot {verb} {redacted_url(url)}: {reason(error)}, for {patience:.0f} s"
            ) from error
        if denied(error):
            raise UserError(_denial(url, verb, error)) from None
        raise


def is_transient(error: BaseException) -> bool:
    """Returns whether the same request may succeed soon: after 429, 5xx, throttling, timeouts, dropped connections."""
    for link in _chain(error):
        if _status(link) in _TRANSIENT_STATUS or _code(link) in _TRANSIENT_CODES:
            return True
    if isinstance(error, FileNotFoundError | FileExistsError):
        return False
    return any(
        isinstance(link, _dropped()) and not isinstance(link, _refused()) and _status(link) is None
        for link in _chain(error)
    )


def denied(error: BaseException) -> bool:
    """Returns whether the store refuses the credentials, or there are none."""
    if isinstance(error, FileNotFoundError | FileExistsError):
        return False
    return any(
        _status(link) in (401, 403)
        or isinstance(link, (PermissionError, *_without_credentials()))
        or (type(link) is OSError and str(link).startswith("Forbidden: "))  # gcsfs, for 403
        for link in _chain(error)
    )


def status(error: BaseException) -> int | None:
    """Returns the HTTP status behind an error of any of the stores' libraries; None where there is none."""
    return next((found for link in _chain(error) if (found := _status(link))), None)


def _status(error: BaseException) -> int | None:
    """Returns an error's HTTP status, where botocore, gcsfs, huggingface_hub, requests or aiohttp store it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = (
        getattr(response, "status_code", None),
        *(getattr(error, k, 0) for k in ("status", "code")),
    )
    return next((int(value) for value in found if value and str(value).isdigit()), None)


def reason(error: BaseException) -> str:
    """Returns the kind of an error in a word or two, without a library's own text."""
    for link in _chain(error):
        if name := _code(link) or _status(link):
            return f"the store answers {name}"
    return type(error).__name__


def redacted_url(url: str) -> str:
    """Returns a URL without any password or signature in it."""
    if not url.startswith(("http://", "https://")):
        return without_secrets(url)
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}{parts.path}"


def _denial(url: str, verb: str, error: BaseException) -> str:
    scheme = url.split("://", 1)[0]
    scheme = {"s3a": "s3", "gcs": "gs"}.get(scheme, scheme)
    source = _CREDENTIALS.get(scheme, "what the store's library looks for")
    return (
        f"access denied: cannot {verb} {redacted_url(url)} ({reason(error)}): check that there are credentials "
        f"({source}) and that they allow it"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _code(error: BaseException) -> str | None:
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


@cache
def _dropped() -> tuple[type[BaseException], ...]:
    """Returns the classes of timeouts and dropped connections of each library, imported only when there is an error."""
    import aiohttp
    import botocore.exceptions
    import botocore.parsers
    import gcsfs.retry
    import google.auth.exceptions
    import httpx2
    import requests

    return (
        TimeoutError, ConnectionError, http.client.IncompleteRead,
        aiohttp.ClientConnectionError, aiohttp.ClientPayloadError,
        botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError,
        botocore.exceptions.IncompleteReadError, botocore.parsers.ResponseParserError,
        httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError,
        requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError,
        google.auth.exceptions.TransportError, gcsfs.retry.ChecksumError,
    )  # fmt: skip


@cache
def _refused() -> tuple[type[BaseException], ...]:
    from huggingface_hub.errors import OfflineModeIsEnabled  # its base class is ConnectionError

    return (OfflineModeIsEnabled,)


@cache
def _without_credentials() -> tuple[type[BaseException], ...]:
    import botocore.exceptions
    import google.auth.exceptions

    return (
        botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError,
        botocore.exceptions.CredentialRetrievalError, google.auth.exceptions.DefaultCredentialsError,
        google.auth.exceptions.RefreshError,
    )  # fmt: skip
