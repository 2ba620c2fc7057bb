"""Runs a configuration's patterns and a model's chat template in a process of their own, since either may never end.

Neither `re` nor Jinja can be stopped in any other way, and a template can request any amount of memory.
"""

import contextlib
import json
import os
import pickle
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from calibprune.errors import UserError
from calibprune.process import host_memory

SECONDS = 20.0
"""Time limit of one call."""
MEMORY_BYTES = 1 << 30
"""Memory that a call may use beyond that of the bare process."""
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from calibprune.untrusted import _serve; _serve()"


def limited(
    function: Callable[..., Any], *arguments: Any, seconds: float, memory_bytes: int = MEMORY_BYTES
) -> Any:
    """Calls a module's function in a process of its own, and returns its result, which must be valid JSON.

    Raises TimeoutError after `seconds`, MemoryError where the function needs more than `memory_bytes` for itself, and
    RuntimeError with the message of any other exception.
    """
    job = pickle.dumps((function, arguments, memory_bytes))
    command = [sys.executable, "-c", _CHILD, *sys.path]
    try:
        done = subprocess.run(command, input=job, capture_output=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no end within {seconds:.0f} s") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {"error": f"its process ended with {done.returncode}: {done.stderr[-300:]!r}"}
    if "error" in answer:
        raise (MemoryError if answer.get("memory") else RuntimeError)(answer["error"])
    return answer["value"]


def _serve() -> None:
    """Answers one call of `limited`: a job on stdin, the answer on what was stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not write into the answer
    function, arguments, memory_bytes = pickle.load(sys.stdin.buffer)
    most = host_memory("VmSize") + memory_bytes
    with contextlib.suppress(ValueError):  # this process may have a lower limit already
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        answer = {"value": function(*arguments)}
    except MemoryError:
        answer = {"error": "out of memory", "memory": True}
    except Exception as error:  # untrusted input raises anything
        answer = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answer, answers)
    answers.flush()


@lru_cache(maxsize=256)
def matching(key: str, expression: str, names: tuple[str, ...]) -> frozenset[str]:
    """Finds the names that match a regular expression. Raises UserError with the setting's key if that takes long."""
    try:
        return frozenset(limited(_found_in, expression, names, seconds=SECONDS))
    except (TimeoutError, MemoryError, RuntimeError) as error:
        raise UserError(
            f"{key}: the regular expression {expression!r} is too slow for names such as {names[0]} ({error}): "
            f"write it without repetitions inside repetitions"
        ) from None


def _found_in(expression: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if re.search(expression, name)]


def check_template(
    template: str,
    conversations: Sequence[Sequence[dict[str, Any]]],
    special_tokens: dict[str, Any],
    where: str,
) -> None:
    """Raises UserError where a chat template does not render these conversations in bounded time and memory.

    Any other error is left to the tokenizer, which knows the prompt.
    """
    try:
        limited(_rendered, template, conversations, special_tokens, seconds=SECONDS)
    except (TimeoutError, MemoryError) as error:
        limit = "time" if isinstance(error, TimeoutError) else f"memory ({MEMORY_BYTES >> 30} GiB)"
        raise UserError(
            f"{where} takes too much {limit} for {len(conversations)} prompts ({error}): take another model, or "
            f"prefixes of type dataset"
        ) from None
    except RuntimeError:
        return


def _rendered(
    template: str, conversations: list[list[dict[str, Any]]], special_tokens: dict[str, Any]
) -> int:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        conversations=conversations,
        chat_template=template,
        add_generation_prompt=True,
        **special_tokens,
    )
    return sum(map(len, texts))
