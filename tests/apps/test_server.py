import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager

import httpx
import pytest
import torch
from typer.testing import CliRunner

import dragoman.cli
from commands import load_script
from conftest import transformer
from dragoman.apps import server
from dragoman.apps.batcher import Batcher, QueueFull, Settings, Stopped
from dragoman.apps.limits import Limits
from dragoman.apps.metrics import Histogram, Metrics
from dragoman.data.tokenizers import train_tokenizer
from dragoman.inference.translate import Hypothesis, translate
from inference.tiny import SOURCES, TARGETS, learned_by_heart


@pytest.fixture(scope="module")
def tiny():
    return learned_by_heart()


@asynccontextmanager
async def client_of(app):
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


def post(tiny, *bodies, limits=None):
    """The responses to requests that are sent at the same time, and the metrics after them."""
    app = server.create_app(*tiny, "tiny", limits or Limits())

    async def run():
        async with client_of(app) as client:
            responses = await asyncio.gather(*(client.post("/translate", json=body) for body in bodies))
            return responses, (await client.get("/metrics")).text

    return asyncio.run(run())


def outputs(response):
    assert response.status_code == 200, response.text
    return [[one["text"] for one in found] for found in response.json()["outputs"]]


# Batching, with stand-ins for the model.


def decode_upper(texts, settings, seconds):
    return [[Hypothesis(text.upper(), [5])] for text in texts]


def batches_of(sentences, decode=decode_upper, **limits):
    """Answer sentences (text, tokens, settings) sent at the same time -> (answers, the batches that were made)."""
    batches = []

    def recording(texts, settings, seconds):
        batches.append(texts)
        return decode(texts, settings, seconds)

    async def run():
        batcher = Batcher(recording, Limits(**{"max_wait_ms": 20.0, **limits}), Metrics())
        batcher.start()
        calls = (batcher.answer([text], [tokens], settings) for text, tokens, settings in sentences)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        await batcher.stop()
        return answers

    return asyncio.run(run()), batches


def test_what_waits_with_the_same_settings_is_decoded_together():
    greedy, beam = Settings(), Settings(rows=4)
    sentences = [("a", 3, greedy), ("b", 3, beam), ("c", 3, greedy), ("d", 3, beam), ("e", 3, greedy)]
    answers, batches = batches_of(sentences)
    assert batches == [["a", "c", "e"], ["b", "d"]]
    assert [found[0][0].text for found in answers] == ["A", "B", "C", "D", "E"]


def test_batches_have_similar_lengths_and_both_bounds():
    sentences = [(name, length, Settings()) for name, length in zip("abcdef", (5, 50, 6, 51, 4, 49), strict=True)]
    assert batches_of(sentences, max_batch_size=3)[1] == [["a", "c", "e"], ["b", "d", "f"]]
    assert batches_of(sentences, max_batch_tokens=100)[1] == [["a", "c", "e"], ["b", "f"], ["d"]]
    four_rows = [(text, length, Settings(rows=4)) for text, length, _ in sentences]
    assert batches_of(four_rows, max_batch_tokens=48)[1] == [["a", "c"], ["b"], ["d"], ["e"], ["f"]]


def test_a_full_batch_does_not_wait():
    start = time.perf_counter()
    _, batches = batches_of([("a", 1, Settings()), ("b", 1, Settings())], max_batch_size=2, max_wait_ms=60_000.0)
    assert time.perf_counter() - start < 30
    assert len(batches) == 1


def test_seeded_sentences_are_decoded_alone():
    settings = Settings(seed=3)
    assert batches_of([("a", 1, settings), ("b", 1, settings)])[1] == [["a"], ["b"]]


def test_one_bad_sentence_does_not_spoil_the_others():
    def fussy(texts, settings, seconds):
        if "bad" in texts:
            raise ValueError("no")
        return decode_upper(texts, settings, seconds)

    answers, _ = batches_of([(text, 1, Settings()) for text in ("a", "bad", "c")], fussy)
    assert [answers[0][0][0].text, str(answers[1]), answers[2][0][0].text] == ["A", "no", "C"]


def test_queue_time_outs_and_stopping():
    """The first sentence blocks the model; what waits behind it is refused, times out, is given up or finishes."""
    release, decoded = threading.Event(), []

    def slow(texts, settings, seconds):
        decoded.extend(texts)
        release.wait(20)
        return decode_upper(texts, settings, seconds)

    async def run():
        metrics = Metrics()
        batcher = Batcher(slow, Limits(max_queue=2, max_texts=2, max_wait_ms=0.0, timeout=0.3), metrics)
        with pytest.raises(Stopped):
            await batcher.answer(["early"], [1], Settings())
        batcher.start()
        running = asyncio.create_task(batcher.answer(["running"], [1], Settings()))
        while not decoded:
            await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(batcher.answer([text], [1], Settings())) for text in ("late", "gone")]
        await asyncio.sleep(0.01)
        assert len(batcher) == 2
        with pytest.raises(QueueFull):
            await batcher.answer(["more"], [1], Settings())
        waiting[1].cancel()
        results = await asyncio.gather(running, *waiting, return_exceptions=True)
        assert [type(result) for result in results] == [TimeoutError, TimeoutError, asyncio.CancelledError]
        assert len(batcher) == 0
        assert metrics.dropped_sentences == 2
        last = asyncio.create_task(batcher.answer(["last"], [1], Settings()))
        await asyncio.sleep(0.01)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0.01)
        with pytest.raises(Stopped):
            await batcher.answer(["after"], [1], Settings())
        release.set()
        assert (await last)[0][0].text == "LAST"
        await stopping
        assert decoded == ["running", "last"]

    asyncio.run(run())


def test_who_hurries_waits_for_no_company():
    async def run():
        batcher = Batcher(decode_upper, Limits(max_wait_ms=60_000.0, timeout=100.0), Metrics())
        batcher.start()
        first = asyncio.create_task(batcher.answer(["a"], [1], Settings()))
        await asyncio.sleep(0.01)
        assert len(batcher) == 1
        batcher.hurry()
        found = await asyncio.wait_for(asyncio.gather(first, batcher.answer(["b"], [1], Settings())), 30)
        await batcher.stop()
        return [answers[0][0].text for answers in found]

    assert asyncio.run(run()) == ["A", "B"]


def test_limits():
    with pytest.raises(ValueError, match=r"^max_batch_size must be greater than 0, got 0$"):
        Limits(max_batch_size=0)
    with pytest.raises(ValueError, match=r"^max_queue=3 has no room for one request of max_texts=64 texts$"):
        Limits(max_queue=3)


# The application.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.6},
        {"penalty_alpha": 0.6, "top_k": 3},
        {"max_new_tokens": 2, "repetition_penalty": 1.1},
    ],
)
def test_answers_are_those_of_translate(tiny, options):
    [response], _ = post(tiny, {"text": [*SOURCES, " "], **options})
    wanted = translate(*tiny, [*SOURCES, " "], **options)
    assert outputs(response) == [[one.text for one in found] for found in wanted]
    for found, hypotheses in zip(response.json()["outputs"], wanted, strict=True):
        for one, hypothesis in zip(found, hypotheses, strict=True):
            assert one["tokens"] == len(hypothesis.token_ids)
            assert one["score"] == pytest.approx(hypothesis.score, abs=1e-5)
            assert one["log_probability"] == pytest.approx(hypothesis.log_probability, abs=1e-5)


def test_requests_at_the_same_time_get_their_own_answers(tiny):
    settings = [{"num_beams": 1}, {"num_beams": 2, "scores": False}]
    bodies = [{"text": source, **settings[number % 2]} for number, source in enumerate(SOURCES * 3)]
    responses, metrics = post(tiny, *bodies)
    assert [outputs(response) for response in responses] == [[[target]] for target in TARGETS * 3]
    assert [response.json()["outputs"][0][0]["score"] is None for response in responses[:2]] == [False, True]
    assert 'dragoman_requests_total{path="/translate",status="200"} 30' in metrics
    assert "dragoman_request_seconds_count 30" in metrics
    assert "dragoman_batch_sentences_sum 30.0" in metrics
    assert int(re.search(r"dragoman_batch_sentences_count (\d+)", metrics)[1]) <= 6
    assert "dragoman_queue_sentences 0" in metrics
    assert int(re.search(r"^dragoman_generated_tokens_total (\d+)", metrics, re.M)[1]) >= 60


def test_a_seed_repeats_whatever_is_decoded_beside(tiny):
    noisy = {"text": SOURCES[:3], "do_sample": True, "temperature": 9.0, "max_new_tokens": 6}
    [alone], _ = post(tiny, {**noisy, "seed": 3})
    responses, _ = post(tiny, noisy, {"text": SOURCES}, {**noisy, "seed": 3}, {**noisy, "seed": 4}, noisy)
    first_free, _, again, other, second_free = map(outputs, responses)
    assert again == outputs(alone)
    assert again != other
    assert first_free != second_free


def test_languages():
    texts = ["one two three", "three", "two two one"]
    tokenizer = train_tokenizer(texts, "word", 20, source_languages=["en", "fr"], target_languages=["de", "it"])
    torch.manual_seed(0)
    model = transformer("modern").build(dtype=torch.float32, vocab_size=len(tokenizer))
    chosen = [{"source_lang": "en", "target_lang": "de"}, {"source_lang": "fr", "target_lang": "it"}]
    beside = {"source_lang": "en", "target_lang": "xx"}
    bodies = [{"text": texts}, *({"text": texts, **languages} for languages in (*chosen, beside))]
    (none, *found, unknown), _ = post((model, tokenizer), *bodies)
    for response, languages in zip(found, chosen, strict=True):
        wanted = [best.log_probability for best, *_ in translate(model, tokenizer, texts, **languages)]
        assert [one["log_probability"] for [one] in response.json()["outputs"]] == pytest.approx(wanted, abs=1e-5)
    assert found[0].json() != found[1].json()
    assert (none.status_code, unknown.status_code) == (422, 422)
    assert none.json()["detail"] == "the model has several source languages: give source_lang, one of en, fr"
    assert "the tokenizer does not know the target language 'xx'" in unknown.json()["detail"]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({}, 422, "text: field required"),
        ({"text": 5}, 422, "text must be a text or a list of texts"),
        ({"text": []}, 422, "text holds 0 texts; a request has 1 to 64"),
        ({"text": ["a"] * 65}, 422, "text holds 65 texts; a request has 1 to 64"),
        ({"text": ["a", "a" * 4001]}, 422, "text 2 has 4001 characters; at most 4000 are taken"),
        ({"text": "yes " * 600}, 422, "text 1 has 601 tokens; at most 512 are taken"),
        ({"text": "a", "num_beems": 2}, 422, "unknown field 'num_beems'; the nearest valid one is 'num_beams'"),
        ({"text": "a", "num_beams": "2"}, 422, "num_beams: input should be a valid integer"),
        ({"text": "a", "num_beams": 0}, 422, "num_beams must be greater than 0, got 0"),
        ({"text": "a", "num_beams": 9}, 422, "num_beams is 9; here it is at most 8"),
        ({"text": "a", "max_new_tokens": 257}, 422, "max_new_tokens is 257; here it is at most 256"),
        ({"text": "a", "min_new_tokens": 30}, 422, "min_new_tokens is 30; here it is at most 15"),
        ({"text": "a", "penalty_alpha": 0.6, "top_k": 99}, 422, "top_k is 99; here it is at most 8"),
        ({"text": "a", "num_return_sequences": 3}, 422, "num_return_sequences=3 (--nbest) needs num_beams"),
        (
            {"text": "a", "do_sample": True, "num_return_sequences": 9},
            422,
            "num_return_sequences is 9; here it is at most 8",
        ),
        ({"text": "a", "top_p": 0.9}, 422, "`do_sample` is"),
        ({"text": "a", "do_sample": True, "top_p": 1.5}, 422, "top_p must be greater than 0 and at most 1, got 1.5"),
        ({"text": "a", "do_sample": True, "temperature": 0.0}, 422, "temperature: input should be greater than"),
        ({"text": "a", "seed": 1}, 422, "seed=1 has no effect without do_sample"),
        ({"text": "a", "penalty_alpha": 0.6, "num_beams": 2}, 422, "penalty_alpha"),
        (
            {"text": "a", "source_lang": "en"},
            422,
            "source_lang is 'en', but the model's tokenizer has no source languages",
        ),
        (
            {"text": "a", "target_lang": "it"},
            422,
            "target_lang is 'it', but the model's tokenizer has no target languages",
        ),
        ([1], 422, 'the body must be a JSON object such as {"text": "..."}, sent as application/json'),
    ],
)
def test_mistakes_get_one_sentence(tiny, body, status, sentence):
    [response], metrics = post(tiny, body)
    assert response.status_code == status
    assert sentence in response.json()["detail"]
    assert "\n" not in response.json()["detail"]
    assert f'status="{status}"}} 1' in metrics


def test_rows_are_bounded_whatever_the_model_was_saved_with(tiny, monkeypatch):
    translator = server.Translator(*tiny, "tiny", Limits())

    def rows(**options):
        return translator.settings(server.TranslationRequest(text="no", **options)).rows

    assert [rows(), rows(num_beams=3), rows(penalty_alpha=0.6), rows(penalty_alpha=0.6, top_k=7)] == [1, 3, 4, 7]
    monkeypatch.setattr(tiny[0].generation_config, "do_sample", True)
    monkeypatch.setattr(tiny[0].generation_config, "num_beams", 2)
    assert [rows(), rows(num_return_sequences=2), rows(penalty_alpha=0.6)] == [2, 2, 4]
    with pytest.raises(ValueError, match=r"^top_k is 99; here it is at most 8$"):
        rows(penalty_alpha=0.6, top_k=99)


def test_bodies_and_paths(tiny):
    app = server.create_app(*tiny, "tiny", Limits(max_body_bytes=100))

    async def chunks():
        for _ in range(60):
            yield b"1234567890"

    async def run():
        async with client_of(app) as client:
            json_type = {"Content-Type": "application/json"}
            for content, headers, status, sentence in [
                (b'{"text": ', json_type, 400, "the body is no valid JSON: Expecting value at character 9"),
                (b'{"text": "\\ud800"}', json_type, 422, "text 1 is no valid Unicode: it has half of"),
                (b'{"text": "a", "\\ud800": 1}', json_type, 422, "the body must be a JSON object"),
                (b"\xff\xfe\xff", json_type, 400, "parsing the body"),
                (b'{"text": "a"}', {"Content-Type": "text/plain"}, 422, "sent as application/json"),
                (b"x" * 101, json_type, 413, "the body is larger than 100 bytes"),
                (chunks(), json_type, 413, "the body is larger than 100 bytes"),
            ]:
                response = await client.post("/translate", content=content, headers=headers)
                assert (response.status_code, sentence in response.json()["detail"]) == (status, True), response.text
            assert (await client.get("/translate")).status_code == 405
            assert (await client.get("/secret")).status_code == 404
            return (await client.get("/metrics")).text

    metrics = asyncio.run(run())
    assert 'dragoman_requests_total{path="/translate",status="413"} 2' in metrics
    assert 'dragoman_requests_total{path="other",status="404"} 1' in metrics


def test_a_failure_is_an_answer_and_counted(tiny, monkeypatch):
    def fail(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(server.Translator, "decode", fail)
    [response], metrics = post(tiny, {"text": "no"})
    assert (response.status_code, response.json()) == (500, {"detail": "the server failed; its log says why"})
    assert 'dragoman_requests_total{path="/translate",status="500"} 1' in metrics


def test_time_outs_full_queues_and_clients_who_leave(tiny, monkeypatch):
    release, decoded = threading.Event(), []

    def slow(self, texts, settings, seconds):
        decoded.extend(texts)
        release.wait(20)
        return decode_upper(texts, settings, seconds)

    monkeypatch.setattr(server.Translator, "decode", slow)
    app = server.create_app(*tiny, "tiny", Limits(timeout=0.5, max_queue=1, max_texts=1, max_wait_ms=0.0))
    body = json.dumps({"text": "leaving"}).encode()

    async def leave():
        """A client that goes away once its request is sent."""
        messages = iter([{"type": "http.request", "body": body}, {"type": "http.disconnect"}])
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/translate", "headers": headers, "query_string": b""}
        sent = []

        async def receive():
            return next(messages)

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)
        return sent[0]["status"]

    async def run():
        async with client_of(app) as client:
            running = asyncio.create_task(client.post("/translate", json={"text": "running"}))
            while not decoded:
                await asyncio.sleep(0.01)
            assert await leave() == 499
            waiting = asyncio.create_task(client.post("/translate", json={"text": "waiting"}))
            await asyncio.sleep(0.05)
            full = await client.post("/translate", json={"text": "more"})
            assert (full.status_code, full.headers["Retry-After"]) == (503, "1")
            assert full.json() == {"detail": "the queue is full: come again later"}
            for late in (await running, await waiting):
                assert late.status_code == 504
                assert late.json() == {"detail": "no answer within 0.5 seconds: send less at once"}
            release.set()
            assert outputs(await client.post("/translate", json={"text": "next"})) == [["NEXT"]]
            return (await client.get("/metrics")).text

    metrics = asyncio.run(run())
    assert decoded == ["running", "next"]
    assert "dragoman_dropped_sentences_total 2" in metrics


def test_health_follows_the_state(tiny):
    app = server.create_app(*tiny, "tiny", Limits())

    async def run():
        async with client_of(app) as client:
            ready = await client.get("/health")
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return ready, await client.get("/health"), await client.post("/translate", json={"text": "no"})

    ready, stopped, refused = asyncio.run(run())
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
    assert stopped.status_code == refused.status_code == 503


def test_the_model_and_the_page_explain(tiny, tmp_path):
    (tmp_path / "experiment.yaml").write_text("data: {train: /home/me/ten pairs, validation: null, source_column: x}")
    app = server.create_app(*tiny, str(tmp_path), Limits(max_new_tokens=9))

    async def run():
        async with client_of(app) as client:
            return [await client.get(path) for path in ("/model", "/docs", "/openapi.json")]

    model, page, schema = asyncio.run(run())
    about = model.json()
    assert about["trained_on"] == {"train": "ten pairs"}
    assert about["parameters"] == tiny[0].num_parameters()
    assert about["limits"]["max_new_tokens"] == 9
    assert not re.search(r"(src|href)=.?(https?:)?//", page.text)
    for field in schema.json()["components"]["schemas"]["TranslationRequest"]["properties"]:
        assert f"<code>{field}</code>" in page.text
    assert set(schema.json()["paths"]["/translate"]["post"]["responses"]) == {"200", "400", "413", "422", "503", "504"}


def test_histograms_are_cumulative():
    histogram = Histogram(1, 2.5)
    for value in (0.5, 1, 2, 7):
        histogram.observe(value)
    assert list(histogram.lines("x")) == [
        'x_bucket{le="1"} 2',
        'x_bucket{le="2.5"} 3',
        'x_bucket{le="+Inf"} 4',
        "x_sum 10.5",
        "x_count 4",
    ]


# The command.


def test_mistakes_before_the_start(monkeypatch, tmp_path):
    def start(*arguments):
        result = CliRunner().invoke(dragoman.cli.app, ["serve", *arguments])
        return result.exit_code, result.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert start("nowhere/at/all", "--port", port) == (
            2,
            f"dragoman serve: cannot listen on 127.0.0.1, port {port} (Address already in use): "
            "choose another --port or --host\n",
        )
    status, sentence = start("nowhere/at/all", "--port", "0")
    assert (status, sentence.startswith("dragoman serve: nowhere/at/all does not exist")) == (2, True)
    assert start("x", "--max-queue", "1")[0] == 2
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "dragoman.apps.server")
    assert start("x") == (
        2,
        "dragoman serve: the server needs fastapi, which is not installed: pip install 'dragoman[serve]'\n",
    )


@pytest.mark.slow
def test_sigterm_answers_what_was_taken_and_takes_nothing_more(tiny, tmp_path):
    for part in tiny:
        part.save_pretrained(tmp_path)
    # One sentence would wait for company until the test has failed: the signal has to end that.
    command = [sys.executable, "-m", "dragoman", "serve", str(tmp_path), "--port", "0", "--max-wait-ms", "1000000"]
    with subprocess.Popen([*command, "--timeout", "1000"], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = re.search(r"http://\S+", process.stdout.readline())[0]
            answers = []
            body = {"text": "the moon", "num_beams": 1}
            asking = threading.Thread(
                target=lambda: answers.append(httpx.post(f"{url}/translate", json=body, timeout=100))
            )
            asking.start()
            deadline = time.monotonic() + 60
            while "dragoman_queue_sentences 1" not in httpx.get(f"{url}/metrics", timeout=60).text:
                assert time.monotonic() < deadline
            process.send_signal(signal.SIGTERM)
            asking.join(timeout=60)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
    assert outputs(answers[0]) == [["la luna"]]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", timeout=5)


@pytest.mark.slow
def test_a_real_server_under_load(tiny, tmp_path, monkeypatch):
    """Start, right answers to several clients, refusals, SIGTERM: scripts/load_test.py in small."""
    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"source": source, "target": target} for source, target in zip(SOURCES, TARGETS, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    load_test = load_script("load_test")
    monkeypatch.setattr(load_test, "GROWTH", 2.0)  # two seconds are no time to settle
    load_test.main(
        str(tmp_path / "model"),
        data=str(tmp_path / "pairs.jsonl"),
        clients=6,
        seconds=2.0,
        compare=False,
        output=tmp_path / "serving.md",
    )
    report = (tmp_path / "serving.md").read_text()
    assert "Faults: none." in report
    for name in ("wrong or crossed answers", "bad requests, anything else", "exit status after SIGTERM"):
        assert f"| {name} | 0 |" in report
    assert int(re.search(r"\| right answers \| ([\d,]+) \|", report)[1].replace(",", "")) > 10
