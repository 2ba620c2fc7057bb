"""Streams the token ids of documents and prompts, in batches through the fast tokenizer.

prefixes.py decides which of them become prefixes, and with how many tokens.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from calibprune.calibration.sources import first_tokens
from calibprune.calibration.texts import Message, documents, prompts
from calibprune.config.generate import DatasetPrefixes, PromptPrefixes
from calibprune.errors import UserError
from calibprune.redact import one_line
from calibprune.untrusted import check_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 256
Item = TypeVar("Item")


def candidates(
    settings: DatasetPrefixes | PromptPrefixes, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[np.ndarray]:
    """Yields int32 token ids for every document or prompt of the source, in order, without a start-of-text token.

    A document is cut after `most_tokens`; a prompt, chat template included, after one more, so that a longer one is
    recognised.
    Raises UserError for a source that cannot be read, and for prompts that no chat template accepts.
    """
    where = {"name": settings.dataset_name, "split": settings.split, "column": settings.column}
    if isinstance(settings, PromptPrefixes):
        for batch in _batches(prompts(settings.path, **where)):
            yield from _prompt_tokens(settings, tokenizer, batch)
    else:
        for batch in _batches(documents(settings.path, **where)):
            for ids in first_tokens(tokenizer, batch, most_tokens(settings)):
                yield np.array(ids, np.int32)


def check_prompts(settings: PromptPrefixes, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Renders the first prompts in a process that can be stopped. Raises UserError for a template that does not end.

    Also raises as `candidates` does for a source that cannot be read.
    """
    where = {"name": settings.dataset_name, "split": settings.split, "column": settings.column}
    batch = next(_batches(prompts(settings.path, **where)), [])
    chats = [chat for prompt in batch if (chat := _conversation(prompt, settings.system))]
    try:
        template = tokenizer.get_chat_template()
    except ValueError:  # there is none, for which `candidates` raises
        return
    name = f"the chat template of {tokenizer.name_or_path}"
    check_template(template, chats, tokenizer.special_tokens_map, name)


def most_tokens(settings: DatasetPrefixes | PromptPrefixes) -> int:
    """Returns the number of tokens of the longest prefix, without a start-of-text token in front."""
    if isinstance(settings, PromptPrefixes):
        return settings.max_prompt_tokens
    return settings.tokens[1] if isinstance(settings.tokens, tuple) else settings.tokens


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    while batch := list(islice(items, BATCH)):
        yield batch


def _prompt_tokens(
    settings: PromptPrefixes,
    tokenizer: "PreTrainedTokenizerBase",
    batch: Sequence[str | list[Message]],
) -> Iterator[np.ndarray]:
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise UserError(
            f"prefixes of type prompts need a chat template, the tokenizer of {name} has none: "
            "take an instruction-tuned model, or prefixes of type dataset"
        )
    chats = [_conversation(prompt, settings.system) for prompt in batch]
    asked: Any = [chat for chat in chats if chat]
    tokens: Any = ()
    try:
        if asked:
            tokens = tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, tokenize=True, return_dict=False
            )
    except Exception as error:  # untrusted input raises anything
        raise UserError(
            f"the chat template of {name} refuses a prompt of {settings.path}: {one_line(error)}"
        ) from None
    tokens = iter(tokens)
    for chat in chats:
        ids = next(tokens) if chat else []
        yield np.array(ids[: settings.max_prompt_tokens + 1], np.int32)


def _conversation(prompt: str | list[Message], system: str | None) -> list[Message]:
    """Returns the messages before the answer that the model will write; an answer that is there is left out."""
    if isinstance(prompt, str):
        first = [{"role": "system", "content": system}] if system is not None else []
        return [*first, {"role": "user", "content": prompt}]
    messages = list(prompt)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages
