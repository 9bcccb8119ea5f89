"""Renders conversations by the chat template of the model's tokenizer, to token ids and never by way of text.

Tells which of these tokens are whose: by the template's generation marks where it has them, else by rendering
the conversation up to a message. A token of what stands before a message and of its content is the content's.
Where nothing tells, the record is refused: nothing is guessed.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from daemon.errors import SampleError
from daemon.escaping import cut_short, escape_control
from daemon.prefixes import shared_length
from daemon.recipes import Conversation, Message
from daemon.records import CountedTokens
from daemon.source.counting import EncodedText, counts_none
from daemon.source.message_places import MessagePlaces, Span

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # before what the assistant writes
TODAY = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")
DATE = datetime.date(2024, 7, 26)  # that templates are told, so that results do not depend on the day
MOST_MESSAGES = 1000  # of a conversation whose messages are told apart by rendering it up to each
STAND_INS = ("A", "B")  # contents that differ from their first letter on


class RenderedChat(NamedTuple):
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...] | None  # where its messages are; None where that is unclear
    marked: bytes | None  # a byte for each token, 1 where the template marks it as the assistant's


class ChatTemplate:
    """One tokenizer's chat template."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        self._template = TODAY.sub(lambda found: repr(DATE.strftime(found[1] or found[2] or "")), template)
        self._is_dated = "strftime_now(" in self._template
        self._has_marks = GENERATION.search(template) is not None
        self._places = MessagePlaces()

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate | None:
        """That of a Hugging Face tokenizer; None where it has none."""
        if getattr(tokenizer, "chat_template", None) is None:
            return None
        try:
            return cls(tokenizer, tokenizer.get_chat_template())
        except ValueError:  # several, and none of them the default
            return None

    def encode(
        self, chat: Conversation, tokens: CountedTokens, start: int | None, most: int | None = None
    ) -> EncodedText:
        """The token ids of a conversation, and which of them count; `start` is the first message of its
        completion, 0 where it is a prompt, all of which counts. Of one with more than `most` tokens, which is
        of no use, the ids alone.

        Raises SampleError where the template refuses it, or does not let tell which tokens are whose.
        """
        messages, every = chat.messages, tokens == "all" or start == 0
        if self._is_dated:
            raise SampleError(
                "chat_refused", "has the day of the run in it by the model's chat template: use another model"
            )
        marked = self._has_marks and tokens == "assistant" and not every
        rendered = self._rendered(messages, answer=chat.awaits_answer, offsets=not every, marks=marked)
        ids = tuple(rendered["input_ids"])
        if every or (most is not None and len(ids) > most):
            return EncodedText(ids)
        if tokens == "completion" and start is None:
            raise counts_none(tokens)
        wanted = [number for number, message in enumerate(messages) if message.role == tokens]
        if marked:
            mask = bytes(rendered["assistant_masks"])
            if marks_each(mask, len(wanted)):
                return EncodedText(ids, mask)
        of_completion = start is not None and tokens == "completion"
        if not of_completion and len(messages) > MOST_MESSAGES:
            raise too_many(len(messages))
        text = self._text(messages, answer=chat.awaits_answer)
        if start is not None and of_completion:
            spans = [(self._span(messages, start, text)[0], len(text))]
        else:
            spans = [self._span(messages, number, text) for number in wanted]
        counts = bytearray(len(text) + 1)  # whether a token that ends there does
        for first, last in spans:
            counts[first + 1 : last + 1] = b"\1" * (last - first)
        return EncodedText(ids, bytes([counts[end] for _, end in rendered["offset_mapping"]]))

    def rendered(self, chat: Conversation) -> RenderedChat:
        """The text of which `encode` gives the tokens, and whose it is. Raises SampleError."""
        text = self._text(chat.messages, answer=chat.awaits_answer)
        return RenderedChat(text, self._places.of(chat, text, self._text), self._marked(chat))

    def _marked(self, chat: Conversation) -> bytes | None:
        """Which tokens the template's generation marks enclose; None where they don't tell."""
        if not self._has_marks:
            return None
        tokens = self._rendered(chat.messages, answer=chat.awaits_answer, offsets=False, marks=True)
        mask = bytes(tokens["assistant_masks"])
        answers = sum(message.role == "assistant" for message in chat.messages)
        return mask if marks_each(mask, answers) else None

    def _span(self, messages: Sequence[Message], number: int, text: str) -> tuple[int, int]:
        """Where in the rendered text a message's content begins, and where the next message does.

        What stands before the content is the same whatever the content is; all up to the next message is
        there whether or not one follows. Raises SampleError where that is not so.
        """
        before, role = messages[:number], messages[number].role
        try:
            one, other = (self._text((*before, Message(role, content))) for content in STAND_INS)
            whole = text if number + 1 == len(messages) else self._text(messages[: number + 1])
        except SampleError:
            raise unclear(number) from None
        header = one[: shared_length(one, other)]
        if one == other or not text.startswith(header) or not text.startswith(whole):
            raise unclear(number)
        return len(header), len(whole)

    def _text(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        return str(self._applied(messages, add_generation_prompt=answer, tokenize=False))

    def _rendered(self, messages: Sequence[Message], *, answer: bool, offsets: bool, marks: bool) -> Any:
        """The token ids, and where these are asked for where in the text each ends and which are marked."""
        return self._applied(
            messages,
            add_generation_prompt=answer,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=marks,
            tokenizer_kwargs={"verbose": False, "return_offsets_mapping": offsets},
        )

    def _applied(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [message._asdict() for message in messages], chat_template=self._template, **options
            )
        except Exception as error:  # of the template's own, or of Jinja
            reason = escape_control(cut_short(str(error).partition("\n")[0], 100))
            raise SampleError(
                "chat_refused",
                f"is refused by the model's chat template ({reason}): write it as that expects",
            ) from None


def marks_each(mask: bytes, answers: int) -> bool:
    """Whether there is a run of marked tokens for each of so many messages."""
    return len(re.findall(b"\1+", mask)) == answers


def too_many(messages: int) -> SampleError:
    return SampleError(
        "roles_unclear",
        f"has {messages} messages, and in more than {MOST_MESSAGES} lensd does not look for whose a token is:"
        ' split it, or set analysis.tokens = "all"',
    )


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
