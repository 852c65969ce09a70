"""Recipes: what they say of layers, and what they refuse."""

import pytest

from octavo.errors import RecipeError
from octavo.quantize import LayerRule, load_recipe, read_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_written_as_toml_reads_back_as_the_same(name: str) -> None:
    recipe = load_recipe(name)
    assert read_recipe(recipe.to_toml(), "again") == recipe
    assert recipe.name == name
    assert recipe.description


def test_there_are_the_recipes_that_the_documentation_names() -> None:
    assert recipe_names() == ("best", "cast", "comfy", "row", "static", "tensor")


def test_later_rules_lie_over_earlier_ones() -> None:
    recipe = read_recipe(
        """
        [default]
        granularity = "row"
        low_rank = 8
        [[rules]]
        layers = ["*.mlp.*"]
        granularity = "tensor"
        [[rules]]
        layers = ["*.fc2", "nothing"]
        low_rank = 0
        """,
        "here",
    )
    assert recipe.rule("joint_blocks.0.x_block.attn.qkv") == LayerRule(granularity="row", low_rank=8)
    assert recipe.rule("joint_blocks.0.x_block.mlp.fc1") == LayerRule(granularity="tensor", low_rank=8)
    assert recipe.rule("joint_blocks.0.x_block.mlp.fc2") == LayerRule(granularity="tensor", low_rank=0)


def test_layers_kept_by_a_budget_come_on_top_of_the_rules() -> None:
    recipe = load_recipe("row").with_kept(["joint_blocks.1.x_block.mlp.fc2"])
    assert recipe.rule("joint_blocks.1.x_block.mlp.fc2").keep
    assert not recipe.rule("joint_blocks.0.x_block.mlp.fc2").keep
    assert load_recipe("row").with_kept([]) == load_recipe("row")


def test_block_sizes_survive_the_file() -> None:
    recipe = read_recipe("[default]\ngranularity = 'block'\nblock = [64, 32]", "here")
    assert recipe.default == LayerRule(granularity="block", block=(64, 32))
    assert read_recipe(recipe.to_toml(), "here") == recipe


@pytest.mark.parametrize(
    ("name", "calibrated"), [("cast", False), ("row", False), ("tensor", True), ("comfy", True), ("best", True)]
)
def test_only_recipes_that_look_at_inputs_need_calibration(name: str, calibrated: bool) -> None:
    assert load_recipe(name).needs_calibration is calibrated


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("low_rnk = 3", "'low_rnk'"),
        ("[default]\nlow_rnk = 3", "Did you mean 'low_rank'"),
        ("[default]\nrounding = 'gptx'", "nearest, gptq"),
        ("[default]\nkeep = 1", "true or false"),
        ("[default]\nlow_rank = true", "a whole number"),
        ("[default]\nlow_rank = -1", "negative"),
        ("[default]\ndamping = 'much'", "a number"),
        ("[default]\nblock = [128]", "two sizes"),
        ("[default]\nblock = [128, 0]", "two sizes"),
        ("[[rules]]\nkeep = true", "needs layers"),
        ("[[rules]]\nlayers = []", "needs layers"),
        ("[[rules]]\nlayers = [3]", "needs layers"),
        ("[rules]\nlayers = ['a']", "two brackets"),
        ("rules = [1]", "not a table"),
        ("default = 1", "not a table"),
        ("name = [", "not TOML"),
        ("min_psnr = 'high'", "a number"),
    ],
)
def test_a_recipe_that_says_what_none_can_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match="this file") as caught:
        read_recipe(text, "this file")
    assert said in str(caught.value)


def test_an_unknown_name_lists_the_recipes_and_an_unreadable_file_is_named(tmp_path: object) -> None:
    with pytest.raises(RecipeError, match="best, cast, comfy"):
        load_recipe("bset")
    with pytest.raises(RecipeError, match=r"gone\.toml"):
        load_recipe(f"{tmp_path}/gone.toml")


def test_scales_that_follow_the_schedule_are_only_for_static_inputs() -> None:
    recipe = read_recipe('[default]\ninput = "static"\n[[rules]]\nlayers = ["a.*"]\ninput_steps = true\n', "here")
    assert recipe.rule("a.b").input_steps
    assert recipe.rule("a.b").statistics == {"range"}
    assert not recipe.rule("b").input_steps
    wrong = read_recipe("[default]\ninput_steps = true\n", "here")
    with pytest.raises(RecipeError, match="whose input is dynamic: only static scales can follow"):
        wrong.rule("a")
