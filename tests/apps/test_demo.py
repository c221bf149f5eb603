"""The page in a real browser, headless: what a visitor does, what goes wrong, and how it looks when it is narrow."""

import importlib.util
import itertools
import re
import shutil
import sys
import threading

import pytest
import torch
from typer.testing import CliRunner

import dragoman.cli
from conftest import family
from inference.tiny import SOURCES, learned_by_heart


pytest.importorskip("gradio", reason="the page needs the extra [demo]")

from dragoman.apps import demo
from dragoman.apps.demo import Loaded, build_page, cards, decode_all, describe, launch, numbers, settings_of
from dragoman.data.tokenizers import train_tokenizer
from dragoman.inference.attention_maps import forced_attention
from dragoman.inference.translate import translate


DEFAULTS = (4, 1.0, 0, 0.9, 0.6, 4)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None or not HAS_PLAYWRIGHT,
    reason="needs Debian's chromium (apt-get install chromium) and the Python package playwright",
)


def loaded(model, processing_class) -> Loaded:
    if model.config.model_type == "dragoman":
        model.set_attn_implementation("eager")
    return Loaded(model, processing_class, describe(model))


@pytest.fixture(scope="module")
def models():
    model, tokenizer = learned_by_heart()
    sizes = {"vocab_size": len(tokenizer), "embedding_dim": 16, "tie_lm_head": False}
    attentive = family("bahdanau").build(dtype=torch.float32, **sizes)
    blind = family("lstm").build(dtype=torch.float32, **sizes)
    return {
        "by heart": loaded(model, tokenizer),
        "additive LSTM": loaded(attentive, tokenizer),
        "LSTM of 2014": loaded(blind, tokenizer),
        "two languages": loaded(*bilingual()),
    }


def bilingual():
    torch.manual_seed(0)
    languages = {"source_languages": ["en", "fr"], "target_languages": ["de", "it"]}
    tokenizer = train_tokenizer(SOURCES, "word", **languages)
    return family("modern").build(dtype=torch.float32, vocab_size=len(tokenizer)).eval(), tokenizer


def test_four_strategies_with_what_the_sliders_say(models):
    one = models["by heart"]
    session = decode_all(one, "by heart", "the moon", settings_of(*DEFAULTS))
    assert [output.strategy for output in session.outputs] == ["greedy", "beam", "sampling", "contrastive"]
    greedy, beam = session.outputs[:2]
    assert greedy.hypothesis.text == "la luna"
    assert greedy.tokens == ["la", "luna", "</s>"]
    expected = translate(one.model, one.processing_class, ["the moon"], num_beams=4)[0][0]
    assert beam.hypothesis.score == pytest.approx(expected.score)
    assert settings_of(7, 0.5, 3, 0.8, 0.2, 5) == {
        "greedy": {"num_beams": 1, "do_sample": False, "penalty_alpha": 0.0},
        "beam": {"num_beams": 7, "num_beam_groups": 1, "do_sample": False},
        "sampling": {"num_beams": 1, "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.8},
        "contrastive": {"num_beams": 1, "do_sample": False, "penalty_alpha": 0.2, "top_k": 5},
    }


def test_text_of_visitors_is_no_html(models):
    session = decode_all(models["by heart"], "by heart", "the moon", settings_of(*DEFAULTS))
    session.outputs[0].hypothesis.text = session.outputs[0].tokens[0] = "<b>la</b>"
    assert "<b>" not in cards(session)


def test_the_numbers_are_those_of_the_model(models):
    one = models["by heart"]
    session = decode_all(one, "by heart", "the moon", settings_of(*DEFAULTS))
    session.step = 1
    source, fed = torch.tensor([session.source_ids]), torch.tensor([session.chosen.fed_ids])
    weights = forced_attention(one.model, source, fed)["cross"][1, 0, 1, 1]
    shown = re.findall(r"<tr><th scope=\"row\">.*?</tr>", numbers(one, session, "cross", "1", "1"))
    assert [float(re.findall(r"<td>(\d\.\d{3})</td>", row)[-1]) for row in shown] == pytest.approx(
        weights.tolist(), abs=5.1e-4
    )
    look_ahead = numbers(one, session, "decoder", "0", "0")
    assert (look_ahead.count("<td>open</td>"), look_ahead.count("<td>hidden</td>")) == (2, 1)


def test_it_says_what_the_model_was_trained_on(models, tmp_path):
    model = models["by heart"].model
    assert "does not say what it was trained on" in models["by heart"].about
    (tmp_path / "experiment.yaml").write_text(
        "data: {train: /home/me/pairs.tsv}\ntokenizer: {kind: word}\nmodel: {attention: additive}\n"
    )
    before, model.name_or_path = model.name_or_path, str(tmp_path)
    assert "Trained on `pairs.tsv`" in describe(model)
    assert "attention: additive." in describe(model)
    model.name_or_path = before


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("  ", "There is nothing to translate: type a sentence first."),
        ("the " * 300, "tokens; this page takes up to 256"),
    ],
)
def test_what_cannot_be_translated_is_said(models, source, sentence):
    with pytest.raises(ValueError, match=sentence):
        decode_all(models["by heart"], "by heart", source, settings_of(*DEFAULTS))


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "dragoman.apps.demo")
    result = CliRunner().invoke(dragoman.cli.app, ["demo", "anywhere"])
    assert result.exit_code == 2
    sentence = "the page needs Gradio, which is not installed: pip install 'dragoman[demo]'"
    assert result.stderr == f"dragoman demo: {sentence}\n"


def test_a_model_that_is_not_there():
    result = CliRunner().invoke(dragoman.cli.app, ["demo", "nowhere/at/all"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_it_listens_at_the_loopback_and_phones_nobody(models):
    page = build_page(models)
    assert page.analytics_enabled is False
    page, address = launch(models, port=None, wait=False)
    try:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        assert (page.server_name, page.share) == ("127.0.0.1", False)
    finally:
        page.close()


@pytest.fixture(scope="module")
def address(models):
    page, address = launch(models, port=None, wait=False)
    yield address
    page.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # As root, in a container, Chromium has no sandbox.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visitor(browser, address):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(15_000)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#source textarea")
    yield page
    page.close()


def submit(page, source):
    page.fill("#source textarea", source)
    page.click("#translate")


def card(page, strategy):
    return page.locator(f"section[aria-label={strategy}]")


@in_a_browser
@pytest.mark.slow
def test_a_visit(visitor, address):
    """Translate, click a token, step on, choose a head, change the model."""
    submit(visitor, "the moon")
    card(visitor, "contrastive").wait_for()
    assert card(visitor, "greedy").locator(".text").inner_text() == "la luna"
    assert re.search(
        r"score -\d\.\d{3} · 3 tokens · \d+\.\d\d s", card(visitor, "beam").locator(".numbers").inner_text()
    )

    card(visitor, "beam").get_by_role("button", name="luna").click()
    visitor.wait_for_selector("#where h3:has-text('beam: step 2 of 3')")
    assert visitor.locator("#where .heat tr.chosen th").inner_text() == "luna"
    assert visitor.locator("#where .candidates tr.chosen th").inner_text() == "luna"
    shares = [float(seen.get_attribute("title")) for seen in visitor.locator("#where .seen").all()]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(1, abs=2e-3)

    visitor.click("#forward")
    visitor.wait_for_selector("#where h3:has-text('step 3 of 3')")
    visitor.get_by_label("encoder").check()
    visitor.wait_for_selector("#where h3:has-text('self-attention of the encoder')")
    visitor.get_by_label("decoder").check()
    visitor.wait_for_selector("#where h3:has-text('self-attention of the decoder')")
    visitor.get_by_label("Head", exact=True).click()
    visitor.get_by_role("option", name="1").click()
    visitor.wait_for_selector("#where h3:has-text('all layers, head 1')")
    visitor.wait_for_selector("#stages h3:has-text('head 1')")

    visitor.get_by_label("Beside it").click()
    visitor.get_by_role("option", name="additive LSTM").click()
    visitor.wait_for_selector("#compared:has-text('It has no decoder attention')")
    visitor.get_by_label("additive LSTM").and_(visitor.locator("[type=radio], [type=checkbox]")).check()
    visitor.wait_for_selector("#where h3:has-text('cross-attention')")
    visitor.wait_for_selector("#stages th:has-text('tanh')")
    visitor.get_by_label("LSTM of 2014").check()
    visitor.wait_for_selector("#where:has-text('This model has no attention')")
    assert [url for url in visitor.asked if not url.startswith((address, "data:", "blob:"))] == []


@in_a_browser
@pytest.mark.slow
def test_sliders_reach_the_strategies(visitor, monkeypatch):
    from playwright.sync_api import expect

    asked = []

    def recording(*arguments, **settings):
        asked.append(settings)
        return translate(*arguments, **settings)

    monkeypatch.setattr(demo, "translate", recording)
    visitor.get_by_text("Settings of the strategies").click()
    sliders = visitor.locator("input[type=range]")
    for place, label, default, value in (
        (0, "beam: number of beams", "4", "7"),
        (1, "sampling: temperature", "1", "0.5"),
    ):
        expect(sliders.nth(place)).to_have_value(default)  # the page has put it there
        visitor.get_by_label(f"number input for {label}").fill(value)
        expect(sliders.nth(place)).to_have_value(value)  # the page has taken it
    sliders.nth(4).press("ArrowRight")  # penalty_alpha, by keyboard
    expect(sliders.nth(4)).to_have_value("0.65")
    submit(visitor, "the moon")
    card(visitor, "contrastive").wait_for()
    assert [settings["num_beams"] for settings in asked] == [1, 7, 1, 1]
    assert asked[2]["temperature"] == 0.5
    assert asked[3]["penalty_alpha"] == pytest.approx(0.65)

    card(visitor, "beam").get_by_role("button").first.click()
    visitor.wait_for_selector("#where h3:has-text('beam: step 1')")  # the page is drawn again, menus and all
    visitor.get_by_label("Beside it").click()
    visitor.get_by_role("option", name="additive LSTM").click()
    visitor.wait_for_selector("#compared h3:has-text('additive LSTM, beam')")
    assert {settings["num_beams"] for settings in asked[4:]} == {7}
    decoded = len(asked)
    visitor.click("#forward")
    visitor.wait_for_selector("#where h3:has-text('beam: step 2')")
    assert len(asked) == decoded  # kept


@in_a_browser
@pytest.mark.slow
def test_languages_are_chosen_where_a_model_has_them(visitor, monkeypatch):
    asked = []

    def recording(*arguments, **settings):
        asked.append((settings["source_lang"], settings["target_lang"]))
        return translate(*arguments, **settings)

    monkeypatch.setattr(demo, "translate", recording)
    target = visitor.get_by_label("Language of the target")
    assert not target.is_visible()
    visitor.get_by_label("two languages").and_(visitor.locator("[type=radio]")).first.check()
    target.click()
    visitor.get_by_role("option", name="it").click()
    submit(visitor, "the moon")
    card(visitor, "contrastive").wait_for()
    assert set(asked) == {("en", "it")}


@in_a_browser
@pytest.mark.slow
def test_with_the_keyboard_alone(visitor):
    visitor.locator("#source textarea").focus()
    visitor.keyboard.type("why not")
    visitor.keyboard.press("Tab")
    visitor.keyboard.press("Enter")
    card(visitor, "contrastive").wait_for()
    first = card(visitor, "greedy").locator("button.token").nth(1)
    first.focus()
    visitor.keyboard.press("Enter")
    visitor.wait_for_selector("#where h3:has-text('greedy: step 2')")
    assert visitor.evaluate("document.activeElement.textContent") == "no"  # the focus is where it was
    visitor.locator("#step input[type=range]").press("ArrowLeft")
    visitor.wait_for_selector("#where h3:has-text('greedy: step 1')")


@in_a_browser
@pytest.mark.slow
def test_mistakes_are_said_and_mended(visitor):
    submit(visitor, "   ")
    alert = visitor.get_by_role("alert").filter(has_text="There is nothing to translate")
    alert.wait_for()
    submit(visitor, "the " * 300)
    visitor.get_by_role("alert").filter(has_text="this page takes up to 256: shorten it").wait_for()
    submit(visitor, "the moon")
    card(visitor, "beam").wait_for()
    assert not alert.is_visible()
    assert visitor.locator(".message").count() == 0


@in_a_browser
@pytest.mark.slow
def test_a_narrow_window_shows_everything_without_overlap(visitor):
    visitor.set_viewport_size({"width": 360, "height": 800})
    submit(visitor, "a red house near the sea")
    card(visitor, "contrastive").wait_for()
    visitor.wait_for_selector("#stages table")
    assert visitor.evaluate("document.documentElement.scrollWidth") <= 360
    boxes = [element.bounding_box() for element in visitor.locator("section.card").all()]
    assert len(boxes) == 4
    for above, below in itertools.pairwise(boxes):
        assert above["y"] + above["height"] <= below["y"]
    buttons = [element.bounding_box() for element in card(visitor, "greedy").locator("button.token").all()]
    for number, one in enumerate(buttons):
        assert one["x"] >= 0
        assert one["x"] + one["width"] <= 360
        for other in buttons[number + 1 :]:
            apart = one["x"] + one["width"] <= other["x"] or one["y"] + one["height"] <= other["y"]
            assert apart or other["x"] + other["width"] <= one["x"]


@in_a_browser
@pytest.mark.slow
def test_a_long_request_does_not_block_another(visitor, browser, address, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def waiting(model, processing_class, sentences, **settings):
        if sentences == ["the dog"]:
            begun.set()
            assert go_on.wait(60)
        return translate(model, processing_class, sentences, **settings)

    monkeypatch.setattr(demo, "translate", waiting)
    try:
        submit(visitor, "the dog")
        assert begun.wait(15)
        second = browser.new_page()
        second.goto(address)
        submit(second, "the moon")
        card(second, "contrastive").wait_for(timeout=15_000)
        assert card(visitor, "greedy").count() == 0
    finally:
        go_on.set()
    card(visitor, "contrastive").wait_for()
    assert card(visitor, "greedy").locator(".text").inner_text() == "il cane"
    assert card(second, "greedy").locator(".text").inner_text() == "la luna"
    second.close()
