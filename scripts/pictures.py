"""The pictures of the README, from trained models:

    dragoman train configs/quickstart.yaml
    dragoman train configs/english_chinese.yaml
    python scripts/pictures.py

draws attention maps and masks and photographs the page (where Chromium is installed) into scripts/results.
The picture of quality by length comes from scripts/scoreboard.py.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch

from dragoman.inference.attention_maps import alignment_text, attention_map
from dragoman.inference.loading import load
from dragoman.inference.pictures import read_masks, save_attention, save_masks


RESULTS = Path(__file__).parent / "results"
ENGLISH_ITALIAN = "Open the settings page"
ENGLISH_CHINESE = "I love you"
LAST_LAYER = -1  # the sharpest of these small models
MASKED = (["Open the settings page", "Delete it"], ["Apri la pagina", "Elimina"])
WINDOW = {"width": 1100, "height": 900}


def draw_attention(folder: str, sentence: str, name: str) -> None:
    found = attention_map(*load(folder, "cpu"), sentence, layer=LAST_LAYER)
    report(RESULTS / name, save_attention(found, RESULTS / name))
    print(f"{sentence} → {found.target}\n{alignment_text(found)}\n")


def draw_masks(folder: str, name: str) -> None:
    report(RESULTS / name, save_masks(read_masks(*load(folder, "cpu"), *MASKED), RESULTS / name))


def photograph_page(folders: list[str], chromium: str, name: str) -> None:
    """What a visitor sees after translating a sentence and clicking a token of it."""
    from playwright.sync_api import sync_playwright

    from dragoman.apps.demo import launch, load_for_demo

    models = {Path(folder).name: load_for_demo(folder, "cpu") for folder in folders}
    page, address = launch(models, port=None, wait=False)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        window = browser.new_page(viewport=WINDOW)
        window.goto(address)
        window.fill("#source textarea", ENGLISH_ITALIAN)
        window.click("#translate")
        window.locator("section[aria-label=beam] button.token").nth(2).click()
        window.wait_for_selector("#where h3:has-text('beam: step 3')")
        window.wait_for_timeout(500)  # for the slider to move
        window.screenshot(path=RESULTS / name, full_page=True)
        browser.close()
    page.close()
    report(RESULTS / name, [])


def report(path: Path, warnings: list[str]) -> None:
    print(f"{os.path.relpath(path)} is drawn")
    for warning in warnings:
        print(warning)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--en-it", default="runs/quickstart", help="model of the quickstart")
    parser.add_argument("--en-zh", default="runs/english_chinese", help="model that writes Chinese characters")
    parser.add_argument("--beside", nargs="*", default=[], help="more models for the page")
    arguments = parser.parse_args()
    torch.manual_seed(0)  # of sampling
    draw_attention(arguments.en_it, ENGLISH_ITALIAN, "attention_en_it.png")
    draw_attention(arguments.en_zh, ENGLISH_CHINESE, "attention_en_zh.png")
    draw_masks(arguments.en_it, "masks.png")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("page.png is not drawn: Chromium is not installed")
    else:
        photograph_page([arguments.en_it, *arguments.beside], chromium, "page.png")


if __name__ == "__main__":
    main()
