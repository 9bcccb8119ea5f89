"""Texts as they are stored beside their tokens: the text itself, where and whose each token is.

Token ids are made elsewhere, and are not changed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from daemon.errors import SampleError
from daemon.recipes import ROLES, Conversation, Text
from daemon.records import Int32Array, TextToStore
from daemon.source.chat import ChatTemplate, RenderedChat
from daemon.source.counting import EncodedText
from daemon.source.token_starts import TokenStarts

ASSISTANT = 1 + ROLES.index("assistant")


class Storing:
    """Describes encoded texts of one tokenizer."""

    def __init__(self, backend: Any, chat: ChatTemplate | None) -> None:
        self._starts = TokenStarts(backend)
        self._chat = chat

    def described(
        self, texts: Sequence[Text], encoded: Sequence[EncodedText | SampleError], head: int, most: int | None
    ) -> list[EncodedText | SampleError]:
        """The same with their texts. Those of more than `most` tokens, which are of no use, stay as they are.

        `head` is how many tokens a BOS that was added is.
        """
        result = list(encoded)
        wanted: list[tuple[int, EncodedText, str | RenderedChat]] = []
        for number, (text, one) in enumerate(zip(texts, encoded, strict=True)):
            if isinstance(one, EncodedText) and (most is None or len(one.ids) <= most):
                try:
                    wanted.append((number, one, text if isinstance(text, str) else self._rendered(text)))
                except SampleError as error:
                    result[number] = error
        contents = [text if isinstance(text, str) else text.text for _, _, text in wanted]
        heads = [head if one.bos_added else 0 for _, one, _ in wanted]
        places = self._starts.of(contents, [one.ids for _, one, _ in wanted], heads)
        for (number, one, read), content, starts, before in zip(wanted, contents, places, heads, strict=True):
            roles = None if isinstance(read, str) or starts is None else roles_of(read, starts, before)
            result[number] = EncodedText(
                one.ids, one.counted, one.bos_added, TextToStore(content, starts, roles)
            )
        return result

    def _rendered(self, chat: Conversation) -> RenderedChat:
        assert self._chat is not None, "it encoded the conversation"
        return self._chat.rendered(chat)


def roles_of(chat: RenderedChat, starts: Int32Array, before: int) -> bytes | None:
    """The role of each token, as in `TextToStore`; the first `before` tokens are not of the conversation.

    A token is of the message that its last character is of. None where nothing tells where messages lie.
    """
    if chat.spans is None:
        return None
    of_chars = np.zeros(len(chat.text) + 1, np.uint8)
    for first, last, role in chat.spans:
        of_chars[first:last] = 1 + ROLES.index(role)
    ends = np.maximum(np.append(starts[1:], len(chat.text)), starts + 1)
    roles = of_chars[ends - 1]
    roles[:before] = 0
    if chat.marked is not None:  # the template itself says which tokens the assistant wrote
        roles[roles == ASSISTANT] = 0
        roles[before:][np.frombuffer(chat.marked, np.bool_)] = ASSISTANT
    return bytes(roles)
