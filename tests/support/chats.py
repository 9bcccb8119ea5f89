"""Tiny tokenizers with chat templates of the kinds that models come with."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support import tiny

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (  # generation marks, and BOS of its own
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}|"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant|{% endif %}"
)
MOVED = (  # the system prompt goes into the last user's message; roles have to alternate
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token }}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}[INST] "
    "{% if loop.last or (loop.revindex0 == 1 and turns[-1]['role'] == 'assistant') %}{{ system }}{% endif %}"
    "{{ message['content'] }}[/INST]{% else %} {{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
MERGED = (  # the system prompt goes into the first user's message; earlier turns stay as they are
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<' + messages[0]['content'] + '>>' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token }}{% for message in turns %}{% if message['role'] == 'user' %}"
    "[INST] {% if loop.first %}{{ system }}{% endif %}{{ message['content'] }}[/INST]"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
STRIPPED = (  # what was thought is left out of all answers but the last
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last %}{{ message['content'] }}{% else %}{{ message['content'].split('/')[-1] }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)
COUNTING = "{{ messages[-1]['content'] | length }}|" + CHATML  # what stands first changes with the content
DEFAULTED = (  # a system prompt of its own where the conversation has none
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + CHATML
)
TEMPLATES = {"chatml": CHATML, "marked": MARKED, "moved": MOVED, "merged": MERGED, "defaulted": DEFAULTED}


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token per byte, BOS, and the two marks of a turn."""
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def save_chat_llama(folder: Path, template: str | None) -> Path:
    """The tiny Llama with embeddings for the marks of a turn, and this chat template."""
    tiny.save_llama(folder)
    tokenizer = chat_tokenizer(template)
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
