"""Prompts with and without an example, as token ids: the example comes first, so that all queries share it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_MARK, _ANSWER = "sparseft-prompt-mark", "sparseft-answer-mark"


class Sample(NamedTuple):
    """A prompt and the response that is right for it."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Prompts:
    """The words around samples; `{prompt}` and `{response}` stand for theirs.

    Attributes:
        alone: begins a prompt without an example.
        guided: begins a prompt with one.
        example: an example.
        query: what follows either, the query itself; not empty.
        answer: ends a prompt, before the response. With a chat template, which has words of its own, it is left out.

    Raises:
        TypeError: words that are no text.
        ValueError: an example that would lack its prompt or response, or a query that would lack its prompt.
    """

    alone: str = "Respond to the query."
    guided: str = "Respond to the query. Be guided by this example.\n\nExample:\n"
    example: str = "{prompt}\n{response}"
    query: str = "\n\nQuery:\n{prompt}"
    answer: str = "\n\nResponse:\n"

    def __post_init__(self) -> None:
        for name, words in vars(self).items():
            if not isinstance(words, str):
                raise TypeError(f"prompts.{name} must be a text, got {type(words).__name__}")
        for name, wanted in (("example", ("{prompt}", "{response}")), ("query", ("{prompt}",))):
            words = getattr(self, name)
            missing = [mark for mark in wanted if mark not in words]
            if missing:
                raise ValueError(
                    f"prompts.{name} must contain {' and '.join(wanted)}, where a sample's words go, got {words!r} "
                    f"without {' and '.join(missing)}"
                )


class Target(NamedTuple):
    """What follows an example: the tokens of the query and those of the response, neither empty."""

    tail: list[int]
    response: list[int]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tail) + len(self.response)


@dataclass(frozen=True)
class Encoder:
    """Turns samples into token ids.

    Parts are tokenized one by one and joined, so that a prompt with an example is a prefix that depends on the
    example alone and a rest that depends on the query alone.

    Attributes:
        tokenizer: of transformers, or one with its `encode`, `eos_token_id`, and for chats `apply_chat_template`.
        prompts: the words around samples.
        chat: use the tokenizer's chat template: one turn of the user, answered by the response and what the template
            puts after it. None does so if there is a template. Without, the response ends with the end token, if the
            tokenizer has one.
        alone: tokens before a query without an example.
        guided: tokens before an example.
    """

    tokenizer: Any
    prompts: Prompts = field(default_factory=Prompts)
    chat: bool | None = None
    alone: list[int] = field(init=False)
    guided: list[int] = field(init=False)
    _after: str = field(init=False)
    _end: list[int] = field(init=False)

    def __post_init__(self) -> None:
        missing = [name for name in ("encode", "eos_token_id") if not hasattr(self.tokenizer, name)]
        if missing:
            raise TypeError(
                f"tokenizer must be one of transformers, or have their encode and eos_token_id, got "
                f"{type(self.tokenizer).__name__} without {' and '.join(missing)}"
            )
        template = getattr(self.tokenizer, "chat_template", None)
        if self.chat and template is None:
            raise ValueError("chat=True needs a tokenizer with a chat template, got one without; use chat=False")
        chat = template is not None if self.chat is None else self.chat
        before, after, end = self._chat() if chat else ("", self.prompts.answer, "")
        start = [] if chat else self._start()
        self._set("alone", start + self._ids(before + self.prompts.alone))
        self._set("guided", start + self._ids(before + self.prompts.guided))
        self._set("_after", after)
        eos = self.tokenizer.eos_token_id
        self._set("_end", self._ids(end) if chat else [] if eos is None else [eos])
        if not self.alone or not self.guided:
            raise ValueError("a prompt must begin with something, got empty words in prompts.alone or prompts.guided")

    def example(self, sample: Sample) -> list[int]:
        """Return the tokens of an example."""
        return self._ids(_filled(self.prompts.example, sample))

    def target(self, sample: Sample) -> Target:
        """Return the tokens of a query and its response."""
        tail = self._ids(_filled(self.prompts.query, sample) + self._after)
        return Target(tail, self._ids(sample.response) + self._end)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _start(self) -> list[int]:
        """Return the token that the tokenizer begins every text with, if it does."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return [bos] if bos is not None and self.tokenizer.encode("a")[:1] == [bos] else []

    def _chat(self) -> tuple[str, str, str]:
        """Return what the template puts before the user's words, between these and the response, and after it."""
        turns = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _ANSWER}]
        # not from a prompt to answer: some templates put an empty thought between it and an answer
        chat = self.tokenizer.apply_chat_template(turns, tokenize=False)
        if chat.count(_MARK) != 1 or chat.count(_ANSWER) != 1:
            raise ValueError(
                "the chat template must render each message once and as it is written; use chat=False, or another one"
            )
        before, rest = chat.split(_MARK)
        between, after = rest.split(_ANSWER)
        return before, between, after.rstrip()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def checked(name: str, samples: Sequence[Any]) -> list[Sample]:
    """Return samples as such.

    Raises:
        TypeError: they are no list, or one is not a pair of texts.
        ValueError: there are none, or a response is empty.
    """
    if not hasattr(samples, "__iter__") and not hasattr(samples, "__getitem__"):
        raise TypeError(f"{name} must be a list of pairs (prompt, response), got {_described(samples)}")
    found = []
    for position, sample in enumerate(samples):
        if (
            isinstance(sample, str)
            or not isinstance(sample, Sequence)
            or len(sample) != 2
            or not all(isinstance(text, str) for text in sample)
        ):
            raise TypeError(f"{name}[{position}] must be a pair (prompt, response) of texts, got {_described(sample)}")
        found.append(Sample(*sample))
    if not found:
        raise ValueError(f"{name} must hold at least one sample, got none")
    empty = [position for position, sample in enumerate(found) if not sample.response.strip()]
    if empty:
        raise ValueError(
            f"every sample of {name} must have a response, got empty ones at {empty[:5]}"
            f"{' and elsewhere' if len(empty) > 5 else ''}; leave these out"
        )
    return found


def _described(sample: Any) -> str:
    kind = type(sample).__name__
    if isinstance(sample, str) or not isinstance(sample, Sequence):
        return f"a {kind}"
    if len(sample) != 2:
        return f"a {kind} of {len(sample)}"
    return f"a {kind} of {' and '.join(type(text).__name__ for text in sample)}"


def _filled(words: str, sample: Sample) -> str:
    return re.sub(r"\{(prompt|response)\}", lambda found: str(getattr(sample, found[1])), words)
