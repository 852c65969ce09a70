"""Which files make up a model."""

import shutil
from pathlib import Path

from octavo.checkpoint.folders import EMBEDDED
from octavo.pipeline.assemble import EMBEDDED_MODEL, load
from tests.tiny_tree import write_tiny_tree


def test_a_file_made_of_the_embedded_model_takes_its_encoders_wherever_it_lies(tmp_path: Path) -> None:
    copy = tmp_path / "mine.safetensors"
    shutil.copy(EMBEDDED_MODEL, copy)
    components = load(copy, models_dir=tmp_path / "empty")
    assert components.embedded
    assert [part.path.parent.name for part in components.encoders] == ["text_encoders"] * 3
    assert components.mmdit.path == copy


def test_the_embedded_model_draws_beside_other_encoders_of_the_same_names(tmp_path: Path) -> None:
    """Whoever has real models has a clip_l.safetensors, too."""
    components = load(models_dir=write_tiny_tree(tmp_path / "models"))
    assert {part.path.parent for part in components.encoders} == {EMBEDDED / "text_encoders"}


def test_a_copied_or_retrained_tree_is_complete_in_itself(tmp_path: Path) -> None:
    tree = tmp_path / "models"
    shutil.copytree(EMBEDDED, tree)
    for name in ("octavo-demo", "octavo-demo-fp8"):
        components = load(name, models_dir=tree)
        assert {part.path.parent for part in components.encoders} == {tree / "text_encoders"}
        assert components.vae.path == tree / "checkpoints" / "octavo-demo.safetensors"
