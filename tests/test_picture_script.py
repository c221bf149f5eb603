import importlib.util
import shutil
from pathlib import Path

import pytest
from PIL import Image

from inference.tiny import learned_by_heart


@pytest.fixture
def script(tmp_path, monkeypatch):
    """scripts/pictures.py, drawing into another folder, of the sentence that its model knows by heart."""
    path = Path(__file__).parents[1] / "scripts" / "pictures.py"
    spec = importlib.util.spec_from_file_location("pictures_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    for name in ("ENGLISH_ITALIAN", "ENGLISH_CHINESE"):
        monkeypatch.setattr(module, name, "the red moon")
    return module


@pytest.mark.slow
def test_the_pictures_of_the_readme(script, tmp_path, monkeypatch, capsys):
    folder = str(tmp_path / "model")
    for part in learned_by_heart():
        part.save_pretrained(folder)
    can_photograph = shutil.which("chromium") and importlib.util.find_spec("gradio")
    if not can_photograph:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("sys.argv", ["pictures.py", "--en-it", folder, "--en-zh", folder])
    script.main()
    expected = {"attention_en_it.png", "attention_en_zh.png", "masks.png"} | ({"page.png"} if can_photograph else set())
    assert {path.name for path in tmp_path.glob("*.png")} == expected
    for path in tmp_path.glob("*.png"):
        assert len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 10  # not a blank sheet
    assert "the red moon →" in capsys.readouterr().out
