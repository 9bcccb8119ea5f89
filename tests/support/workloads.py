"""Input files for `lensd bench` and for tests of memory: made text, of any number and length.

`python -m tests.support.workloads documents --text FILE... --out F.jsonl` cuts documents of 100 to 600 tokens
(by the bundled model's tokenizer) out of text files; `system-prompt` makes records that share a beginning of
300.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from daemon.model.loading import load_tokenizer
from daemon.model.location import locate_model
from daemon.model.smollm2 import default_cache_dir

SHORTEST, LONGEST = 100, 600  # tokens of a document
SYSTEM_TOKENS = 300
QUESTIONS = ("What is {a} plus {b}?", "Is {a} larger than {b}?", "Name a number between {a} and {b}.")


def tokenizer() -> Any:
    return load_tokenizer(locate_model("smollm2-135m", default_cache_dir()))


def documents(texts: list[str], n: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """n documents of SHORTEST to LONGEST tokens, cut from the texts one after the other."""
    chance = random.Random(seed)
    encode = tokenizer()
    tokens = [token for text in texts for token in encode(text, add_special_tokens=False)["input_ids"]]
    at = 0
    for number in range(n):
        length = chance.randint(SHORTEST, LONGEST)
        if at + length > len(tokens):
            at = chance.randrange(LONGEST)
        yield {"id": f"d{number}", "text": encode.decode(tokens[at : at + length])}
        at += length


def shared_prompt(n: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """n questions that all follow the same SYSTEM_TOKENS tokens of instructions."""
    chance = random.Random(seed)
    encode = tokenizer()
    rules = " ".join(f"Rule {rule}: answer in {rule + 3} words." for rule in range(100))
    system = encode.decode(encode(rules, add_special_tokens=False)["input_ids"][:SYSTEM_TOKENS])
    for number in range(n):
        question = chance.choice(QUESTIONS).format(a=chance.randrange(1000), b=chance.randrange(1000))
        yield {"id": f"q{number}", "text": f"{system}\n\n{question}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("documents", "system-prompt"))
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="what documents are cut from")
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.kind == "documents" and not args.text:
        parser.error("documents need --text")
    texts = [path.read_text(encoding="utf-8") for path in args.text]
    records = documents(texts, args.records) if args.kind == "documents" else shared_prompt(args.records)
    with args.out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
