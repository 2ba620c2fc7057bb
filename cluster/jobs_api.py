"""Ray's job server, from outside the cluster: reaches it, follows a job's log, and finds the driver's exit code."""

import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from calibprune.errors import ClusterUnavailable, UserError
from calibprune.events import note
from calibprune.redact import one_line

CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 120.0
"""Time limits of a request: to connect, and to wait for each part of the answer."""
SENDING_SECONDS = 900.0
"""Longest time in which a package may be sent over a slow line."""
POLL_SECONDS, SILENT_SECONDS = 2.0, 10.0
"""Pause between two requests for a job's state, and for the log of a job that has long been silent."""
READING_SHARE = 0.1
"""Largest share of the time that may go into reading a log."""
PATIENCE_SECONDS = 900.0
"""Longest time in which a command retries while the job server fails or cannot be reached."""
LOG_SECONDS = 120.0
"""Longest time in which the rest of an ended job's log is requested: it may be gone together with its node."""
ENVIRONMENT = "RAY_API_SERVER_ADDRESS"
STOPPED, UNKNOWN = 143, 1
"""Exit codes of jobs for which Ray has none: that of a process ended by SIGTERM, and that of any failure."""
_TOKEN = "by RAY_AUTH_TOKEN, by a file named by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"
T = TypeVar("T")


class Unreachable(ClusterUnavailable):
    """Nothing answers at the address of the job server."""


class Failing(ClusterUnavailable):
    """The job server, or a proxy in front of it, answers with an error that may pass."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client(JobSubmissionClient):
    """Ray's own client with time limits, and with an error class for each kind of failure.

    Its methods raise UserError for what the user can fix (a token, a bad request), else ClusterUnavailable.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        for module in ("dashboard_sdk", "job.sdk"):  # these log every upload
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        super().__init__(*arguments, **named)

    def _do_request(self, method: str, endpoint: str, **more: Any) -> requests.Response:
        """Sends a request with time limits: every request of Ray's client goes through this method, the only private
        one that is used here."""
        # requests applies the first limit until the request is sent, its body included
        limits = (SENDING_SECONDS if more.get("data") else CONNECT_SECONDS, ANSWER_SECONDS)
        try:
            return super()._do_request(
                method, endpoint, timeout=limits, hooks={"response": self._check}, **more
            )
        except requests.exceptions.RequestException as error:
            raise Unreachable(
                f"cannot reach the job server at {self.get_address()}: {_cause(error)}"
            ) from None

    def _check(self, answer: requests.Response, **_: object) -> None:
        """Raises for HTTP statuses that mean failure, which Ray's client would turn into plain texts."""
        status, address = answer.status_code, self.get_address()
        if status == 401:
            raise UserError(
                f"{address} requires a token: set RAY_AUTH_MODE=token, and give the cluster's token {_TOKEN}"
            )
        if status == 403:
            raise UserError(f"{address} refuses the token: give the cluster's own {_TOKEN}")
        path = answer.request.path_url
        if status < 400 or (
            status == 404 and "/api/jobs/" not in path
        ):  # a file that is not there is no failure
            return
        message = f"the job server at {address} answers {status}{_last_line(answer)}"
        if status in (404, 408, 425, 429) or status >= 500:
            raise Failing(message, status)
        raise UserError(f"{message}, to {answer.request.method} {path}")

    def job(self, submission_id: str) -> JobDetails:
        """Returns what Ray knows of a job. Raises UserError where it knows no job of that id."""
        try:
            return self.get_job_info(submission_id)
        except Failing as error:
            # a proxy whose cluster is away answers "not found" too; only Ray itself answers with a list
            if error.status != 404 or any(
                job.submission_id == submission_id for job in self.list_jobs()
            ):
                raise
        raise UserError(
            f"the cluster knows no job {submission_id}: if it was restarted, submitting again resumes the run"
        )


def patiently(work: Callable[[], T]) -> T:
    """Returns what `work` does, with retries for up to PATIENCE_SECONDS while the job server fails or is away."""
    deadline, failures = time.monotonic() + PATIENCE_SECONDS, 0
    while True:
        try:
            return work()
        except ClusterUnavailable as error:
            if time.monotonic() > deadline:
                raise
            failures += 1
            if failures == 2:  # a single failure is over too soon to mention
                note(f"{error}; retrying for up to {PATIENCE_SECONDS:.0f} s")
            time.sleep(min(10.0, 0.5 * failures))


def reach(address: str | None) -> Client:
    """Connects to the job server at an address such as http://head:8265; None: the one that the environment names.

    Raises UserError, with what to do, where no address is known, no job server answers there, or it requires a token;
    Failing where it fails.
    """
    named = address or os.environ.get(ENVIRONMENT) or os.environ.get("RAY_ADDRESS")
    if not named:
        raise UserError(
            f"no cluster is named: give --address http://HEAD:8265, Ray's dashboard, or set {ENVIRONMENT}"
        )
    if (address or os.environ.get(ENVIRONMENT)) and "://" not in named and named != "auto":
        named = f"http://{named}"
    os.environ[ENVIRONMENT] = named  # Ray prefers the environment to the argument
    try:
        return Client(named)
    except Failing:
        raise
    except Unreachable as error:
        raise UserError(
            f"{error}; it is Ray's dashboard, as in http://HEAD:8265, not the port that nodes join at (6379), and "
            f"from outside the cluster it may need a tunnel, such as `ssh -L 8265:localhost:8265 HEAD`"
        ) from None
    except AuthenticationError:
        raise UserError(
            f"RAY_AUTH_MODE is token, but no token was found: give that of {named} {_TOKEN}"
        ) from None
    except (RuntimeError, OSError, ValueError, KeyError, AssertionError) as error:
        reason = one_line(error, 150)
        raise UserError(
            f"{named} is not a Ray job server: give the address of its dashboard, as in http://HEAD:8265 ({reason})"
        ) from None


def follow(client: Client, submission_id: str, show: Callable[[str], object]) -> JobDetails:
    """Hands a job's log to `show`, piece by piece from its beginning, until the job has ended; returns the ended job.

    Ray's server sends a log only as a whole. So it is read every 2 s while it grows and every 10 s while it does not,
    and less often where it is long: at most a tenth of the time goes into reading. A log of 1 MB that keeps growing
    costs 0.5 MB a second; one that takes 3 s to read is read every 30 s. The job's state is requested every 2 s, which
    costs little.

    After a lost connection no part of the log is missing or repeated. Raises ClusterUnavailable when the cluster stays
    away for PATIENCE_SECONDS, and UserError when it does not know the job.
    """
    log, ended = _Log(client, submission_id), None
    failures, heard_at = 0, time.monotonic()
    while True:
        try:
            if ended is None:
                job = client.job(submission_id)
                heard_at = time.monotonic()
                ended = job if job.status.is_terminal() else None
            if (ended or time.monotonic() >= log.due) and (text := log.news()):
                show(text)
            if ended:
                return ended
            failures = 0
        except ClusterUnavailable as error:
            failures += 1
            away = time.monotonic() - heard_at
            if ended and away > LOG_SECONDS:
                note(f"the end of the log is missing: {error}")
                return ended
            if away > PATIENCE_SECONDS:
                raise ClusterUnavailable(
                    f"{error}; no longer following the job, which goes on if its cluster does"
                ) from None
            if failures == 1:
                note(f"{error}; the log goes on when it answers")
        time.sleep(min(SILENT_SECONDS, POLL_SECONDS * max(1, failures)))


class _Log:
    """A job's log, which Ray sends as a whole each time."""

    def __init__(self, client: Client, submission_id: str) -> None:
        self._client, self._id = client, submission_id
        self._shown, self._pause = 0, POLL_SECONDS
        self.due = 0.0
        """Time of the next reading, by the monotonic clock."""

    def news(self) -> str:
        """Returns what was added since the last call."""
        begun = time.monotonic()
        text = self._client.get_job_logs(self._id)
        ended = time.monotonic()
        news, self._shown = text[self._shown :], max(self._shown, len(text))
        self._pause = POLL_SECONDS if news else min(SILENT_SECONDS, 1.5 * self._pause)
        self.due = ended + max(self._pause, (ended - begun) / READING_SHARE)
        return news


def exit_code(job: JobDetails) -> int:
    """Returns the driver's exit code as a shell would; Ray's commands give 1 for any failure, 0 for a stopped job."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return STOPPED
    code = job.driver_exit_code or UNKNOWN
    return 128 - code if code < 0 else code


def _last_line(answer: requests.Response) -> str:
    """Returns the last line of Ray's answer in parentheses: the error, where it sends a traceback."""
    if "text/plain" not in answer.headers.get("Content-Type", ""):
        return ""
    lines = [line for line in answer.text.splitlines() if re.search(r"\w", line)]
    return f" ({one_line(lines[-1], 200)})" if lines else ""


def _cause(error: requests.exceptions.RequestException) -> str:
    """Returns the operating system's own message from beneath those of the libraries."""
    if isinstance(error, requests.exceptions.ReadTimeout):
        return f"no answer within {ANSWER_SECONDS:.0f} s"
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return f"no answer within {CONNECT_SECONDS:.0f} s"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, requests.exceptions.SSLError):
        return "it does not speak TLS as expected"
    return "what listens there does not speak HTTP"
