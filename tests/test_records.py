"""How a record becomes texts, and what is shipped of it."""

from __future__ import annotations

import pytest

from daemon.recipes import CONTRAST_RECIPE, Recipe
from daemon.records import Sample, TokenizedSample

PROMPT = "The bridge opened"


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        (PROMPT, "at dusk", "The bridge opened at dusk"),
        (PROMPT, " at dusk", "The bridge opened at dusk"),
        (PROMPT, "\nat dusk", "The bridge opened\nat dusk"),
        (PROMPT, "\u00a0at dusk", "The bridge opened\u00a0at dusk"),
        (PROMPT, ", at dusk", "The bridge opened, at dusk"),
        (PROMPT, "(at dusk)", "The bridge opened(at dusk)"),
        (PROMPT, "\u201cat dusk\u201d", "The bridge opened\u201cat dusk\u201d"),
        (PROMPT, "-5", "The bridge opened -5"),
        (PROMPT, ".5", "The bridge opened .5"),
        (PROMPT, "-.5", "The bridge opened -.5"),
        (PROMPT, "-at dusk", "The bridge opened-at dusk"),
        (PROMPT, "...5", "The bridge opened...5"),
        (PROMPT, "\u3002", "The bridge opened\u3002"),
        (PROMPT, "$5", "The bridge opened $5"),
        (PROMPT, "5", "The bridge opened 5"),
        (PROMPT, "\u20ac5", "The bridge opened \u20ac5"),
        (PROMPT, "", "The bridge opened"),
        (PROMPT + " ", "at dusk", "The bridge opened at dusk"),
        (PROMPT + "\n", "at dusk", "The bridge opened\nat dusk"),
        (PROMPT + " ", " at dusk", "The bridge opened  at dusk"),
        (PROMPT + ":", "at dusk", "The bridge opened: at dusk"),
        ("", "at dusk", "at dusk"),
        ("", " at dusk", " at dusk"),
        ("", "", ""),
    ],
)
def test_a_space_joins_prompt_and_completion_where_neither_brings_its_own(prompt, completion, text):
    values = {"prompt": prompt, "fact": completion, "hallucination": completion}
    assert CONTRAST_RECIPE.render(values) == (prompt, text, text)


@pytest.mark.parametrize("completion", ["at dusk", " at dusk", ", at dusk", ""])
def test_configured_templates_are_literal(completion):
    recipe = Recipe(CONTRAST_RECIPE.templates, CONTRAST_RECIPE.contrast)
    values = {"prompt": PROMPT, "fact": completion, "hallucination": completion}
    assert recipe.render(values) == (PROMPT, f"{PROMPT} {completion}", f"{PROMPT} {completion}")
    assert recipe != CONTRAST_RECIPE


def test_braces_in_a_field_are_text():
    values = {"prompt": "{fact}", "fact": "{prompt}", "hallucination": "}"}
    assert CONTRAST_RECIPE.render(values) == ("{fact}", "{fact}{prompt}", "{fact}}")


def test_a_sample_is_shipped_with_its_tokens_and_which_of_them_count():
    sample = Sample(3, "id", "domain", 1.0, "{}", ("text",), 4, 5)
    bare = TokenizedSample(sample, ((1, 2),), (b"\0\1",)).without_texts()
    assert (bare.sample.texts, bare.sample.sample_id, bare.token_ids) == ((), "id", ((1, 2),))
    assert bare.counted == (b"\0\1",)
