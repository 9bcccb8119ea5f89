"""Where in a rendered conversation each message lies, told without a guess.

A conversation of the same roles is rendered whose contents are marks. Where that rendering, with the contents
in place of the marks, is the text, the marks tell where each content is; a message ends where the rendering
of the conversation up to it does. Knows no tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from daemon.errors import SampleError
from daemon.recipes import Conversation, Message

MARK = re.compile("\ue000([0-9]+)\ue001")  # the content of a message, by its number
MOST_MESSAGES = 200  # of a conversation, which is rendered up to each of them
SHAPES = 256  # that are remembered, one for each sequence of roles
FORMS: tuple[Callable[[str], str], ...] = (str, str.strip)  # in which templates use a content


class Render(Protocol):
    """Renders messages by a template, with `answer` up to where the assistant begins. Raises SampleError."""

    def __call__(self, messages: Sequence[Message], *, answer: bool = False) -> str: ...


class Span(NamedTuple):
    """A run of characters of a text, and the role of the message that they belong to."""

    first: int
    last: int
    role: str


@dataclass(frozen=True, slots=True)
class Shape:
    """A rendering without contents: text, then numbers of messages and the text behind each one's content."""

    beginning: str
    rest: tuple[tuple[int, str], ...]
    tails: tuple[int, ...]  # how many characters of each such text still belong to the message


class MessagePlaces:
    """Finds the messages in conversations that one template renders."""

    def __init__(self) -> None:
        self._shapes: dict[tuple[tuple[str, ...], bool], Shape | None] = {}

    def of(self, chat: Conversation, text: str, render: Render) -> tuple[Span, ...] | None:
        """The messages in `text`, which is how `render` renders the conversation; None where that is unclear.

        A message's characters are its content and what closes it, up to where the next message begins.
        """
        roles = tuple([message.role for message in chat.messages])
        if len(roles) > MOST_MESSAGES:
            return None
        if (roles, chat.awaits_answer) not in self._shapes:
            if len(self._shapes) >= SHAPES:
                self._shapes.clear()
            self._shapes[roles, chat.awaits_answer] = shape_of(roles, chat.awaits_answer, render)
        shape = self._shapes[roles, chat.awaits_answer]
        if shape is None:
            return None
        for form in FORMS:
            contents = [form(message.content) for message in chat.messages]
            if text == shape.beginning + "".join([contents[number] + then for number, then in shape.rest]):
                return spans_of(shape, contents, roles)
        return None


def shape_of(roles: Sequence[str], awaits_answer: bool, render: Render) -> Shape | None:
    """How conversations of these roles are rendered; None where the template refuses the marks."""
    messages = [Message(role, f"\ue000{number}\ue001") for number, role in enumerate(roles)]
    try:
        whole = render(messages, answer=awaits_answer)
    except SampleError:
        return None
    beginning, *rest = MARK.split(whole)
    found = [(int(number), then) for number, then in zip(rest[::2], rest[1::2], strict=True)]
    ends = [match.end() for match in MARK.finditer(whole)]
    tails = []
    for (number, then), end in zip(found, ends, strict=True):
        tail = length_up_to(messages[: number + 1], whole, render) - end
        tails.append(tail if 0 <= tail <= len(then) else 0)
    return Shape(beginning, tuple(found), tuple(tails))


def length_up_to(messages: Sequence[Message], whole: str, render: Render) -> int:
    """Where the last of these messages ends in the whole conversation; -1 where nothing tells."""
    try:
        text = render(messages)
    except SampleError:
        return -1
    return len(text) if whole.startswith(text) else -1


def spans_of(shape: Shape, contents: Sequence[str], roles: Sequence[str]) -> tuple[Span, ...]:
    spans, at = [], len(shape.beginning)
    for (number, then), tail in zip(shape.rest, shape.tails, strict=True):
        end = at + len(contents[number])
        spans.append(Span(at, end + tail, roles[number]))
        at = end + len(then)
    return tuple(spans)
