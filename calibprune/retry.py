"""What an error of a store means, and the waiting between attempts: passing trouble is sat out, a refusal is final.

The stores' own libraries try a request a few times within seconds by themselves (botocore, gcsfs, huggingface_hub);
here the same call is made again for up to two minutes. Messages hold the URL and the kind of error only, never a
library's own text: an address may be signed.
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
"""No attempt starts later than this after the first one."""
QUIET_SECONDS = 5.0
"""From then on every wait is logged."""

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
    """What `operation` returns; while a store fails in passing it is called again, with growing and jittered waits.

    Raises UserError at once where access is denied, StoreUnavailable when the trouble outlasts `patience_seconds`
    (default RETRY_SECONDS), and every other error as it is.
    """
    patience = RETRY_SECONDS if patience_seconds is None else patience_seconds

    def tell(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        waited = state.seconds_since_start or 0.0
        if error and waited > QUIET_SECONDS:
            _log.warning("cannot %s %s: %s; trying on", verb, redacted_url(url), reason(error))

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_exponential_jitter(initial=0.25, max=20, jitter=0.5),
        stop=tenacity.stop_before_delay(patience),
        before_sleep=tell,
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
    """Whether the same request may succeed a little later: 429, 5xx, throttling, timeouts, dropped connections."""
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
    """Whether the store refuses these credentials, or there are none."""
    if isinstance(error, FileNotFoundError | FileExistsError):
        return False
    return any(
        _status(link) in (401, 403)
        or isinstance(link, (PermissionError, *_without_credentials()))
        or (type(link) is OSError and str(link).startswith("Forbidden: "))  # gcsfs, for 403
        for link in _chain(error)
    )


def status(error: BaseException) -> int | None:
    """The HTTP status behind an error of any of the stores' libraries."""
    return next((found for link in _chain(error) if (found := _status(link))), None)


def _status(error: BaseException) -> int | None:
    """As botocore, gcsfs, huggingface_hub, requests and aiohttp tell it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = (
        getattr(response, "status_code", None),
        *(getattr(error, k, 0) for k in ("status", "code")),
    )
    return next((int(value) for value in found if value and str(value).isdigit()), None)


def reason(error: BaseException) -> str:
    """The kind of an error in a word or two, without a library's own text."""
    for link in _chain(error):
        if name := _code(link) or _status(link):
            return f"the store answers {name}"
    return type(error).__name__


def redacted_url(url: str) -> str:
    """A URL without the password or signature it may hold."""
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
    """Timeouts and dropped connections, as each library calls them. Imported late: only an error needs them."""
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
    from huggingface_hub.errors import OfflineModeIsEnabled  # a ConnectionError, by choice

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
