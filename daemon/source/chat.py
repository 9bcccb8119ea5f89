"""Renders conversations by the chat template of the model's tokenizer, to token ids and never by way of text.

Tells which of these tokens are whose: by the template's generation marks where it has them, else by rendering
the conversation up to a message. Where neither tells, the record is refused: nothing is guessed.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any

from daemon.errors import SampleError
from daemon.escaping import cut_short, escape_control
from daemon.recipes import Conversation, Message
from daemon.records import CountedTokens
from daemon.source.counting import EncodedText, counts_none

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # before what the assistant writes
TODAY = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")
DATE = datetime.date(2024, 7, 26)  # that templates are told, so that results do not depend on the day
STAND_INS = ("A", "B")  # contents that differ in their first token


class ChatTemplate:
    """One tokenizer's chat template."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        self._template = TODAY.sub(lambda found: repr(DATE.strftime(found[1] or found[2] or "")), template)
        self._has_marks = GENERATION.search(template) is not None

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate | None:
        """That of a Hugging Face tokenizer; None where it has none."""
        if getattr(tokenizer, "chat_template", None) is None:
            return None
        try:
            return cls(tokenizer, tokenizer.get_chat_template())
        except ValueError:  # several, and none of them the default
            return None

    def encode(self, chat: Conversation, tokens: CountedTokens, start: int | None) -> EncodedText:
        """The token ids of a conversation, and which of them count; `start` is the first message of its
        completion, 0 where it is a prompt, all of which counts.

        Raises SampleError where the template refuses it, or does not let tell which tokens are whose.
        """
        messages = chat.messages
        marked = self._has_marks and tokens == "assistant" and start != 0
        rendered = self._rendered(messages, answer=chat.awaits_answer, marks=marked)
        ids = tuple(rendered["input_ids"])
        if tokens == "all" or start == 0:
            return EncodedText(ids)
        if tokens == "completion":
            if start is None:
                raise counts_none(tokens)
            begin, _ = self._span(messages, start, ids)
            return EncodedText(ids, bytes(begin) + b"\1" * (len(ids) - begin))
        wanted = [number for number, message in enumerate(messages) if message.role == tokens]
        if marked:
            mask = bytes(rendered["assistant_masks"])
            if len(re.findall(b"\1+", mask)) == len(wanted):
                return EncodedText(ids, mask)
        counted = bytearray(len(ids))
        for number in wanted:
            begin, end = self._span(messages, number, ids)
            counted[begin:end] = b"\1" * (end - begin)
        return EncodedText(ids, bytes(counted))

    def _span(self, messages: Sequence[Message], number: int, ids: tuple[int, ...]) -> tuple[int, int]:
        """Where among `ids` a message's content begins, and where the next message does.

        What stands before the content is the same whatever the content is; all up to the next message is
        there whether or not one follows. Raises SampleError where that is not so. A token of both what stands
        before and the content belongs to the content.
        """
        before, role = messages[:number], messages[number].role
        try:
            one, other = (self._ids((*before, Message(role, content))) for content in STAND_INS)
            whole = ids if number + 1 == len(messages) else self._ids(messages[: number + 1])
        except SampleError:
            raise unclear(number) from None
        header = shared(one, other)
        begin = shared(one[:header], ids)
        if header == min(len(one), len(other)) or header - begin > 1 or ids[: len(whole)] != whole:
            raise unclear(number)
        return begin, len(whole)

    def _ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(self._rendered(messages, answer=False, marks=False)["input_ids"])

    def _rendered(self, messages: Sequence[Message], *, answer: bool, marks: bool) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [message._asdict() for message in messages],
                chat_template=self._template,
                add_generation_prompt=answer,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=marks,
                tokenizer_kwargs={"verbose": False},
            )
        except Exception as error:  # of the template's own, or of Jinja
            reason = escape_control(cut_short(str(error).partition("\n")[0], 100))
            raise SampleError(
                "chat_refused",
                f"is refused by the model's chat template ({reason}): write it as that expects",
            ) from None


def shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def unclear(number: int) -> SampleError:
    return SampleError(
        "roles_unclear",
        f"is rendered such that nothing tells which tokens are its message {number + 1}: the model's chat"
        ' template moves or drops messages: set analysis.tokens = "all", or leave it out',
    )


def no_template() -> SampleError:
    return SampleError(
        "no_chat_template",
        "is a conversation, and the model's tokenizer has no chat template: use a model that has one, usually"
        " named -Instruct, -Chat or -it",
    )
