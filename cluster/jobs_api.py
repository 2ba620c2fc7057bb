"""Ray's job server as seen from outside the cluster: how to reach it, to follow a log, to learn the true exit code."""

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from calibprune.errors import UserError
from calibprune.redact import one_line

CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 120.0
SENDING_SECONDS = 900.0
LOOK_SECONDS = 1.0
"""Of silence, after which it is asked whether the job has ended."""
SILENT_SECONDS = 60.0
"""After which the log is asked for anew: a connection that is lost without a word looks like a job that is silent."""
PATIENCE_SECONDS = 900.0
"""For which a job is followed though its cluster does not answer."""
LOG_TRIES = 5
ENVIRONMENT = "RAY_API_SERVER_ADDRESS"
for _module in ("dashboard_sdk", "job.sdk"):
    logging.getLogger(f"ray.dashboard.modules.{_module}").setLevel(logging.WARNING)
STOPPED, UNKNOWN = 143, 1
"""Exit codes where Ray knows none: that of a process that SIGTERM ended, and that of a failure."""


T = TypeVar("T")


class Unreachable(UserError):
    """The cluster does not answer."""


class Failing(Unreachable):
    """What answers there says that it cannot for now: a proxy whose cluster is on its way, a busy head."""


class Client(JobSubmissionClient):
    """Ray's own client, with time limits, and with errors in one line."""

    def _do_request(self, method: str, endpoint: str, **more: Any) -> requests.Response:
        # until a request is sent the first limit counts, and a package may go over a slow line
        limits = (SENDING_SECONDS if more.get("data") else CONNECT_SECONDS, ANSWER_SECONDS)
        try:
            answer = super()._do_request(method, endpoint, timeout=limits, **more)
        except AuthenticationError as error:
            raise UserError(_about_token(self._address, error)) from None
        except requests.exceptions.RequestException as error:
            raise Unreachable(_about_reaching(self._address, error)) from None
        # Ray itself answers 500 to a job that it refuses
        if answer.status_code in (502, 503, 504) or (answer.status_code, method) == (500, "GET"):
            raise Failing(f"the job server at {self._address} answers {answer.status_code}")
        return answer


def patiently(work: Callable[[], T], notice: Callable[[str], None]) -> T:
    """What `work` returns, done again while the job server is failing, for PATIENCE_SECONDS. Raises as it does."""
    deadline, tries = time.monotonic() + PATIENCE_SECONDS, 0
    while True:
        try:
            return work()
        except Failing as error:
            if time.monotonic() > deadline:
                raise
            if tries == 0:
                notice(f"{error}, trying again for {PATIENCE_SECONDS:.0f} s")
        tries += 1
        time.sleep(min(10.0, 0.5 * tries))


def reach(address: str | None) -> Client:
    """The job server at an address such as http://head:8265; None: the one that the environment names, as Ray has it.

    Raises UserError, saying what to do, when there is none, it is not one, or it wants a token.
    """
    named = address or os.environ.get(ENVIRONMENT) or os.environ.get("RAY_ADDRESS")
    if not named:
        raise UserError(
            f"which cluster? --address http://HEAD:8265, Ray's dashboard, or {ENVIRONMENT} in the environment"
        )
    if (address or os.environ.get(ENVIRONMENT)) and "://" not in named and named != "auto":
        named = f"http://{named}"
    os.environ[ENVIRONMENT] = named  # Ray lets the environment go before what it is told
    try:
        return Client(named)
    except UserError:
        raise
    except AuthenticationError as error:
        raise UserError(_about_token(named, error)) from None
    except (RuntimeError, OSError, ValueError, KeyError, AssertionError) as error:
        reason = one_line(error, 150)
        raise UserError(
            f"{named} is no job server of Ray: give the address of its dashboard, as in http://HEAD:8265 ({reason})"
        ) from None


def follow(
    client: Client,
    submission_id: str,
    show: Callable[[str], None],
    notice: Callable[[str], None],
) -> JobDetails:
    """Shows a job's log from its beginning, as it grows, until the job has ended; returns what Ray knows of it then.

    A connection that breaks is made anew, and nothing is shown twice. `show` gets pieces of text, `notice` a line now
    and then. Raises Unreachable when the cluster is not heard of for long, UserError when it does not know the job.
    """
    return asyncio.run(_follow(client, submission_id, show, notice))


async def _follow(
    client: Client, submission_id: str, show: Callable[[str], None], notice: Callable[[str], None]
) -> JobDetails:
    shown, broken, heard_at = 0, 0, time.monotonic()
    while True:
        at, pieces = 0, _pieces(client, submission_id)
        while True:
            try:
                text = await anext(pieces, None)
            except (Unreachable, RuntimeError, aiohttp.ClientError, OSError):
                text, broken = None, broken + 1
            if text is None:
                break
            at += len(text)
            if at > shown:
                show(text[shown - at :])  # whose own errors are not the connection's
                shown, broken = at, 0
        try:
            job = describe(client, submission_id)
            heard_at = time.monotonic()
            if job.status.is_terminal():
                show(await _whole_log(client, submission_id, shown))
                return job
        except Unreachable as error:
            broken += 1
            if time.monotonic() - heard_at > PATIENCE_SECONDS:
                raise Unreachable(
                    f"{error}; the job goes on without being followed, if its cluster does"
                ) from None
        if broken == 1:
            notice("the connection to the log is lost, making it anew")
        await asyncio.sleep(min(10.0, 0.5 + broken))


async def _whole_log(client: Client, submission_id: str, start: int) -> str:
    """An ended job's log from there on; nothing where it is gone with its node."""
    for _ in range(LOG_TRIES):
        try:
            return client.get_job_logs(submission_id)[start:]
        except Unreachable:
            await asyncio.sleep(1.0)
        except RuntimeError:
            break
    return ""


async def _pieces(client: Client, submission_id: str) -> AsyncIterator[str]:
    """The log from its beginning until the job has ended, or there has been nothing for long.

    Ray itself closes it some seconds after the end; whoever asks for the job meanwhile knows sooner.
    """
    stream: Any = client.tail_job_logs(submission_id)

    async def following() -> str | None:
        return await anext(stream, None)

    piece, heard_at = asyncio.create_task(following()), time.monotonic()
    try:
        while time.monotonic() - heard_at < SILENT_SECONDS:
            if (await asyncio.wait([piece], timeout=LOOK_SECONDS))[0]:
                text = piece.result()
                if text is None:
                    return
                yield text
                piece, heard_at = asyncio.create_task(following()), time.monotonic()
            elif describe(client, submission_id).status.is_terminal():
                return
    finally:
        piece.cancel()
        await asyncio.wait([piece])
        await stream.aclose()


def describe(client: Client, submission_id: str) -> JobDetails:
    """What Ray knows of a job. Raises UserError when it knows none of that name, Unreachable when not Ray answers."""
    try:
        return client.get_job_info(submission_id)
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise
        if f"{submission_id} does not exist" not in str(error):
            raise Failing(
                f"no answer of Ray's about job {submission_id}: {one_line(error, 150)}"
            ) from None
        raise UserError(
            f"the cluster knows no job {submission_id}: was it started anew? Submitting again resumes the run"
        ) from None


def exit_code(job: JobDetails) -> int:
    """Of the driver, as a shell would tell it; Ray's own commands tell 1 of all failures and 0 of a stopped job."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return STOPPED
    code = job.driver_exit_code or UNKNOWN
    return 128 - code if code < 0 else code


def already_used(error: RuntimeError) -> bool:
    """Whether a job was refused because there is one of that name."""
    return re.search(r"submission_id \S+ already exists", str(error)) is not None


def _about_token(address: str, error: AuthenticationError) -> str:
    if "Authentication failed" in str(error):
        return (
            f"{address} refuses the token: put the cluster's own into RAY_AUTH_TOKEN, a file named by "
            f"RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token"
        )
    return (
        f"{address} wants a token: set RAY_AUTH_MODE=token, and give the cluster's token by RAY_AUTH_TOKEN, by a file "
        f"named by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"
    )


def _about_reaching(address: str, error: requests.exceptions.RequestException) -> str:
    if isinstance(error, requests.exceptions.ReadTimeout):
        reason = f"no answer within {ANSWER_SECONDS:.0f} s"
    elif isinstance(error, requests.exceptions.ConnectTimeout):
        reason = f"no answer within {CONNECT_SECONDS:.0f} s"
    else:
        reason = _first_cause(error)
    return (
        f"cannot reach the job server at {address}: {reason}; it is Ray's dashboard, as in http://HEAD:8265, not the "
        f"port that nodes join at (6379), and from outside the cluster it may need a tunnel, such as "
        f"`ssh -L 8265:localhost:8265 HEAD`"
    )


def _first_cause(error: BaseException) -> str:
    """What the system said, from beneath what libraries made of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, requests.exceptions.SSLError):
        return "it does not speak TLS as expected"
    return "what listens there does not speak HTTP"
