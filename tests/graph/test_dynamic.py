"""Texts that offer choices."""

import random
import time

import pytest

from octavo.graph.dynamic import choose


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("a {red|green} fox", {"a red fox", "a green fox"}),
        ("{a {big|small}|no} fox", {"a big fox", "a small fox", "no fox"}),
        (r"\{red|green\}", {"{red|green}"}),
        ("a fox /* shy */at night // or day", {"a fox at night "}),
        ("a /* b */ c /* d", {"a  c /* d"}),
        ("see https://example.org", {"see https://example.org"}),
        ("{", {"{"}),
        ("}{", {"}{"}),
    ],
)
def test_each_choice_can_fall(text, possible):
    assert {choose(text, random.Random(seed)) for seed in range(60)} == possible


@pytest.mark.parametrize("text", ["{a|b}" * 40_000, "{" * 100_000 + "}" * 100_000, "/*" * 100_000, "//" * 100_000])
def test_texts_made_to_take_long_do_not(text):
    """Five seconds are a hundred times what they need; trying every pair of places takes minutes."""
    begun = time.perf_counter()

    choose(text)

    assert time.perf_counter() - begun < 5
