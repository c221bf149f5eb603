import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from inference.tiny import learned_by_heart


SCRIPTS = Path(__file__).parents[1] / "scripts"
# Draws into another folder, of the sentence that the model knows by heart. In a process of its own, because the page's
# server keeps writing to standard output, which pytest takes away between its tests.
DRAW = """
import sys
from pathlib import Path
import pictures
pictures.RESULTS = Path(sys.argv.pop(1))
pictures.ENGLISH_ITALIAN = pictures.ENGLISH_CHINESE = "the red moon"
pictures.main()
"""


@pytest.mark.slow
def test_the_pictures_of_the_readme(tmp_path):
    folder = str(tmp_path / "model")
    for part in learned_by_heart():
        part.save_pretrained(folder)
    can_photograph = shutil.which("chromium") and importlib.util.find_spec("gradio")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")])}
    if not can_photograph:
        environment["PATH"] = str(Path(sys.executable).parent)
    command = [sys.executable, "-c", DRAW, str(tmp_path), "--en-it", folder, "--en-zh", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {"attention_en_it.png", "attention_en_zh.png", "masks.png"} | ({"page.png"} if can_photograph else set())
    assert {path.name for path in tmp_path.glob("*.png")} == expected
    for path in tmp_path.glob("*.png"):
        assert len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 10  # not a blank sheet
    assert "the red moon →" in done.stdout
