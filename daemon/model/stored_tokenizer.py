"""A model's tokenizer as a stamp holds it: its backend at once, the rest of Transformers' own when asked for.

Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from daemon.model.failures import quiet_libraries


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """All of a Hugging Face tokenizer that a stamp holds."""

    backend: str  # of the tokenizers library, as JSON
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | None  # the default one; None where there is none, or none is the default
    puts_bos: bool  # whether by its own habit it puts BOS before a text

    @classmethod
    def of(cls, tokenizer: Any, *, puts_bos: bool) -> TokenizerFacts:
        try:
            template = None if tokenizer.chat_template is None else str(tokenizer.get_chat_template())
        except ValueError:  # several, and none of them the default
            template = None
        return cls(
            backend=tokenizer.backend_tokenizer.to_str(),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            chat_template=template,
            puts_bos=puts_bos,
        )


class StoredTokenizer:
    """Stands in the place of a Hugging Face tokenizer; another process is sent that one."""

    is_fast = True

    def __init__(self, facts: TokenizerFacts, folder: str) -> None:
        """`folder` holds the files of the tokenizer, for what the facts lack."""
        from tokenizers import Tokenizer

        self.backend_tokenizer = Tokenizer.from_str(facts.backend)
        self.bos_token_id = facts.bos_token_id
        self.eos_token_id = facts.eos_token_id
        self.chat_template = facts.chat_template
        self.puts_bos = facts.puts_bos
        self._folder = folder
        self._whole: Any = None

    def get_chat_template(self) -> str | None:
        return self.chat_template

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        """As the Hugging Face tokenizer does, which is loaded at the first conversation: a second or two."""
        return self.whole().apply_chat_template(*args, **options)

    def whole(self) -> Any:
        """The Hugging Face tokenizer. Raises what its loader raises."""
        if self._whole is None:
            from transformers import AutoTokenizer

            quiet_libraries()
            self._whole = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
        return self._whole

    def __reduce__(self) -> tuple[Any, ...]:
        return itself, (self.whole(),)  # another process may have no such folder


def itself(tokenizer: Any) -> Any:
    return tokenizer
