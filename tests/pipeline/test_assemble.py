"""Which files make up a model."""

import shutil
from pathlib import Path

from octavo.pipeline.assemble import EMBEDDED_MODEL, load


def test_a_file_made_of_the_embedded_model_takes_its_encoders_wherever_it_lies(tmp_path: Path) -> None:
    copy = tmp_path / "mine.safetensors"
    shutil.copy(EMBEDDED_MODEL, copy)
    components = load(copy, models_dir=tmp_path / "empty")
    assert components.embedded
    assert [part.path.parent.name for part in components.encoders] == ["text_encoders"] * 3
    assert components.mmdit.path == copy
