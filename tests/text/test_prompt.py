"""Weights, escapes and embedding references of a prompt."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.text.prompt import GREATEST_WEIGHT, Reference, escape, parse_weights, split_references

anything = st.text(alphabet=st.one_of(st.characters(exclude_categories=()), st.sampled_from("()[]\\:.0123456789-e ")))


def parsed(prompt: str) -> list[tuple[str, float]]:
    return [(segment.text, pytest.approx(segment.weight)) for segment in parse_weights(prompt)]


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("", []),
        ("a cat", [("a cat", 1)]),
        ("(cat)", [("cat", 1.1)]),
        ("((cat))", [("cat", 1.21)]),
        ("(cat:1.3)", [("cat", 1.3)]),
        ("(cat: 1.3 )", [("cat", 1.3)]),
        ("(cat:-.5)", [("cat", -0.5)]),
        ("(cat:1e-1)", [("cat", 0.1)]),
        ("a (b) c", [("a ", 1), ("b", 1.1), (" c", 1)]),
        ("(a (b:1.5) c:1.2)", [("a ", 1.2), ("b", 1.5), (" c", 1.2)]),
        ("((a):2)", [("a", 2.2)]),
        ("(a:1.3:1.5)", [("a:1.3", 1.5)]),
        ("[b] a:1.2", [("[b] a:1.2", 1)]),
        ("()", []),
        ("( :2)", [(" ", 2)]),
    ],
)
def test_brackets_multiply_and_numbers_replace(prompt: str, segments: list[tuple[str, float]]) -> None:
    assert parsed(prompt) == segments


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("(:1.5)", [(":1.5", 1.1)]),
        ("(a:)", [("a:", 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:nan)", [("a:nan", 1.1)]),
        ("(a:inf)", [("a:inf", 1.1)]),
        ("(a:1e999)", [("a:1e999", 1.1)]),
        ("(a:1_0)", [("a:1_0", 1.1)]),
        ("(a:١)", [("a:١", 1.1)]),
    ],
)
def test_what_is_no_number_after_text_stays_text(prompt: str, segments: list[tuple[str, float]]) -> None:
    assert parsed(prompt) == segments


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("(open:1.4", [("(open:1.4", 1)]),
        ("closed) (b)", [("closed) ", 1), ("b", 1.1)]),
        ("a (b (c:2)", [("a (b ", 1), ("c", 2)]),
        (":) and ):", [(":) and ):", 1)]),
    ],
)
def test_a_bracket_without_partner_is_text(prompt: str, segments: list[tuple[str, float]]) -> None:
    assert parsed(prompt) == segments


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        (r"\(a\)", [("(a)", 1)]),
        (r"(\(a\):2)", [("(a)", 2)]),
        (r"\\(a\\)", [(r"\(a\)", 1)]),
        (r"back\slash", [(r"back\slash", 1)]),
    ],
)
def test_escaped_brackets_are_text(prompt: str, segments: list[tuple[str, float]]) -> None:
    assert parsed(prompt) == segments


@settings(deadline=None)
@given(anything)
def test_any_string_parses_to_finite_weights(prompt: str) -> None:
    for segment in parse_weights(prompt):
        assert segment.text
        assert abs(segment.weight) <= GREATEST_WEIGHT
        segment.text.encode("utf-8")


@settings(deadline=None)
@given(st.text())
def test_escaping_gives_the_text_back_unweighted(text: str) -> None:
    assert parsed(escape(text)) == ([(text, 1)] if text else [])


@settings(deadline=None)
@given(st.text(alphabet=string.ascii_letters + " ,.[]:0123456789"))
def test_text_without_brackets_has_weight_one(text: str) -> None:
    assert parsed(text) == ([(text, 1)] if text else [])


texts = st.text(alphabet="ab, ", min_size=1).map(lambda text: [(text, 1.0)])


@settings(deadline=None)
@given(
    st.recursive(
        texts,
        lambda inner: st.tuples(inner, st.one_of(st.none(), st.sampled_from([0.5, 1.25, -2.0]))),
        max_leaves=8,
    )
)
def test_weights_follow_the_nesting(tree: object) -> None:
    """Oracle: the tree that the prompt was written from."""

    def write(node: object) -> str:
        if isinstance(node, list):
            return str(node[0][0])
        inner, number = node  # type: ignore[misc]
        return f"({write(inner)})" if number is None else f"({write(inner)}:{number})"

    def weigh(node: object, weight: float) -> tuple[str, float]:
        if isinstance(node, list):
            return str(node[0][0]), weight
        inner, number = node  # type: ignore[misc]
        return weigh(inner, weight * 1.1 if number is None else number)

    text, weight = weigh(tree, 1.0)
    assert parsed(write(tree)) == [(text, pytest.approx(weight))]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a cat", ["a cat"]),
        ("embedding:old", [Reference("old")]),
        ("embedding:old.safetensors cat", [Reference("old"), " cat"]),
        ("in embedding:old, blue", ["in ", Reference("old"), ", blue"]),
        ("in embedding:odd, blue", ["in ", Reference("odd,"), " blue"]),
        ("a\nembedding:new embedding:old", ["a\n", Reference("new"), " ", Reference("old")]),
        ("noembedding:old", ["noembedding:old"]),
        ("embedding: old", ["embedding: old"]),
        ("embedding:,", [Reference(",")]),
    ],
)
def test_references_are_parted_from_text(text: str, parts: list[str | Reference]) -> None:
    assert list(split_references(text, known={"old", "odd,"}.__contains__)) == parts


@settings(deadline=None)
@given(st.lists(st.sampled_from(["embedding:", "old", " ", ",", "\n", "x"])).map("".join))
def test_parting_references_loses_no_text(text: str) -> None:
    parts = split_references(text, known={"old"}.__contains__)
    assert "".join(f"embedding:{part.name}" if isinstance(part, Reference) else part for part in parts) == text


@pytest.mark.parametrize("prompt", ["(" * 20_000, ")" * 20_000, "(" * 10_000 + "a" + ")" * 10_000, "\\" * 20_000])
def test_deep_nesting_needs_no_deep_stack(prompt: str) -> None:
    assert all(abs(segment.weight) <= GREATEST_WEIGHT for segment in parse_weights(prompt))


def test_lone_surrogates_become_replacement_characters() -> None:
    assert parsed("a\ud800b") == [("a\ufffdb", 1)]
