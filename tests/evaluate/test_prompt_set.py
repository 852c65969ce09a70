"""The prompts of a comparison: many, different, and with a truth where there is one."""

from pathlib import Path

import pytest

from octavo.errors import RequestError
from octavo.evaluate.checker import judge, load_classifier, read
from octavo.evaluate.prompt_set import (
    EMBEDDED_STAGE,
    STANDING,
    Prompt,
    builtin_prompts,
    read_prompts,
    reference_scenes,
)
from octavo.evaluate.prompts import questions
from octavo.train.captions import words
from octavo.train.drawing import draw, to_bytes


def test_built_in_prompts_are_many_different_and_open_with_the_standing_three() -> None:
    prompts = builtin_prompts(embedded=False)
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 128
    for prompt, words_of_it in zip(
        prompts, (("cyberpunk", "neon"), ("wizard", "runes"), ("pianist", "keys")), strict=False
    ):
        assert all(word in prompt.text for word in words_of_it)
    assert sum(bool(prompt.words) for prompt in prompts) >= 20


def test_more_pictures_than_prompts_begin_again_with_the_first() -> None:
    prompts = builtin_prompts(130, embedded=False)
    assert prompts[128:] == prompts[:2]
    assert builtin_prompts(2, embedded=False) == prompts[:2]


def test_the_embedded_model_is_asked_what_it_knows_and_can_be_checked() -> None:
    prompts = builtin_prompts(20, embedded=True)
    assert [prompt.text for prompt in prompts[STANDING:]] == [q.prompt for q in questions(EMBEDDED_STAGE, 17)]
    known = set(words())
    assert all(set(prompt.text.split()) <= known for prompt in prompts)
    scenes = [prompt.scene for prompt in prompts if prompt.scene is not None]
    assert len(scenes) == 20
    classifier = load_classifier()
    for scene, picture in zip(scenes, to_bytes(draw(scenes, 128)), strict=True):
        assert judge(scene, read(picture, classifier))["all"]


def test_the_reference_set_shows_other_scenes_than_those_asked_for() -> None:
    asked = {prompt.scene for prompt in builtin_prompts(60, embedded=True)}
    assert not asked & set(reference_scenes(60))
    assert reference_scenes(5) == reference_scenes(5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a sign that says "Fresh bread"', ("FRESH", "BREAD")),
        ("two of “ONE” and “two-three”", ("ONE", "TWO", "THREE")),
        ("a pianist's hands", ()),
        ('an open " quote', ()),
    ],
)
def test_words_to_show_are_those_in_quotes(text: str, expected: tuple[str, ...]) -> None:
    assert Prompt(text).words == expected


def test_a_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two \n", "utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == ["one", "two"]
    assert [prompt.text for prompt in read_prompts(path, 3)] == ["one", "two", "one"]
    path.write_text("\n", "utf-8")
    with pytest.raises(RequestError, match="no prompt"):
        read_prompts(path)
    with pytest.raises(RequestError, match="Cannot read"):
        read_prompts(tmp_path / "none.txt")
