"""A model behind HTTP: `dragoman serve`. Requests that wait together are decoded together (batcher.py)."""

import asyncio
import copy
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from dragoman.apps.batcher import Batcher, QueueFull, Settings, Stopped
from dragoman.apps.limits import Limits
from dragoman.apps.metrics import Metrics
from dragoman.data.languages import check_language, encode_texts, languages, saved_prefix
from dragoman.data.tokenizers import ProcessingClass
from dragoman.inference.arguments import GenerationArguments, check_generation
from dragoman.inference.loading import load
from dragoman.inference.translate import Hypothesis, check_generation_arguments, translate
from dragoman.settings import nearest, one_line, parse_mapping
from dragoman.training.card import data_name
from dragoman.training.checkpoints import EXPERIMENT_FILE


try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
    from pydantic import BaseModel, ConfigDict, Field
except ModuleNotFoundError as error:
    raise ValueError(f"the server needs {error.name}, which is not installed: pip install 'dragoman[serve]'") from error


# A client that was refused for want of room may come again after so many seconds.
RETRY_AFTER = {"Retry-After": "1"}
PATHS = ("/translate", "/health", "/metrics", "/model", "/docs", "/openapi.json")


class TranslationRequest(BaseModel):
    """What is left out is as the model was saved with: GET /model shows it."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    text: str | list[str] = Field(description="One source text or several.", examples=[["Open the settings page"]])
    scores: bool = Field(True, description="Compute scores, by one more pass over the outputs.")
    num_return_sequences: int = Field(1, ge=1, description="Outputs per text, the best first.")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Of sampling: the same text, settings and seed give the same outputs."
    )
    source_lang: str | None = Field(None, description="Code, for a model with several languages.")
    target_lang: str | None = Field(None, description="The same for the output.")
    max_new_tokens: int | None = Field(None, description="Longest output, in tokens.")
    min_new_tokens: int | None = Field(None, description="Shortest output, in tokens.")
    num_beams: int | None = Field(None, description="1 for greedy search, more for beam search.")
    early_stopping: bool | Literal["never"] | None = Field(None, description="When beam search ends.")
    length_penalty: float | None = Field(None, ge=-10, le=10, description="Above 0 favors long outputs of beam search.")
    do_sample: bool | None = Field(None, description="Draw from the distribution.")
    temperature: float | None = Field(None, ge=0.01, le=100, description="Of sampling.")
    top_k: int | None = Field(
        None, description="Sample from so many tokens, 0 from all; candidates with penalty_alpha."
    )
    top_p: float | None = Field(None, description="Sample from the most probable tokens with this probability.")
    min_p: float | None = Field(None, description="Sample from tokens at least so probable, beside the best.")
    typical_p: float | None = Field(None, description="Locally typical sampling.")
    penalty_alpha: float | None = Field(None, description="Contrastive search with this degeneration penalty.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="Above 1 against repeated tokens.")
    no_repeat_ngram_size: int | None = Field(None, description="No n-gram of this size occurs twice.")


# The others go to generate(); the dataclass knows their ranges.
OWN_FIELDS = {"text", "scores", "num_return_sequences", "seed", "source_lang", "target_lang"}


class Output(BaseModel):
    text: str
    score: float | None = Field(description="What beam search ranks by: log_probability / tokens ** length_penalty.")
    log_probability: float | None = Field(description="Natural logarithm of the output's probability.")
    tokens: int = Field(description="Length of the output.")


class TranslationResponse(BaseModel):
    outputs: list[list[Output]] = Field(description="For each text, in order, its outputs, the best first.")


class Problem(BaseModel):
    detail: str = Field(description="What is wrong and what is allowed, in one sentence.")


class Translator:
    """A model with what the event loop and the model's thread need of it.

    Args:
        model, processing_class: as `load` gives them.
        name: folder or name on the Hub, for `describe`.
    """

    def __init__(self, model: PreTrainedModel, processing_class: ProcessingClass, name: str, limits: Limits) -> None:
        self.model, self.processing_class, self.name, self.limits = model, processing_class, name, limits
        # A fast tokenizer must not be set up in one thread while another one encodes with it.
        self.counter = copy.deepcopy(processing_class)
        config, defaults = model.config.to_dict(), model.generation_config
        self.max_tokens, self.max_new_tokens = limits.max_tokens, limits.max_new_tokens
        if config.get("position_embedding_type") == "learned":
            self.max_tokens = min(self.max_tokens, config["max_position_embeddings"])
            self.max_new_tokens = min(self.max_new_tokens, config["max_position_embeddings"] - 1)
        own_length = defaults.max_new_tokens or (defaults.max_length or 21) - 1  # 20: the default of generate()
        self.default_max_new_tokens = min(own_length, self.max_new_tokens)

    def count_tokens(self, texts: list[str], source_lang: str | None) -> list[int]:
        """
        Raises:
            ValueError: too many texts, one that is too long, or a language that the model does not have.
        """
        limits = self.limits
        if not 1 <= len(texts) <= limits.max_texts:
            raise ValueError(f"text holds {len(texts)} texts; a request has 1 to {limits.max_texts}")
        for number, text in enumerate(texts, start=1):
            if len(text) > limits.max_characters:
                raise ValueError(f"text {number} has {len(text)} characters; at most {limits.max_characters} are taken")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"text {number} is no valid Unicode: it has half of a surrogate pair") from error
        prefix = saved_prefix(self.counter) or ""
        sources = [prefix + text for text in texts]
        lengths = list(map(len, encode_texts(self.counter, "source", sources, [source_lang] * len(texts))))
        for number, length in enumerate(lengths, start=1):
            if length > self.max_tokens:
                raise ValueError(f"text {number} has {length} tokens; at most {self.max_tokens} are taken")
        return lengths

    def settings(self, request: TranslationRequest) -> Settings:
        """
        Raises:
            ValueError: an option out of its range or of the server's limits, or without effect beside the others.
        """
        arguments = GenerationArguments(**request.model_dump(exclude=OWN_FIELDS))
        check_generation(arguments, "")
        if request.target_lang is not None:
            check_language(self.counter, "target", request.target_lang)
        given, defaults = arguments.given(), self.model.generation_config
        check_generation_arguments(self.model, given, request.num_return_sequences)
        # In the call it means one beam and no sampling, whatever the model was saved with.
        asked = given.get("penalty_alpha")
        sampling = given.get("do_sample", False if asked else defaults.do_sample)
        beams = given.get("num_beams", 1 if asked else defaults.num_beams) or 1
        contrasting = asked or (asked is None and defaults.penalty_alpha and not sampling and beams == 1)
        bounds = {
            "num_beams": self.limits.max_beams,
            "num_return_sequences": self.limits.max_beams,
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": given.get("max_new_tokens", self.default_max_new_tokens),
        }
        if contrasting:
            bounds["top_k"] = self.limits.max_beams
        for name, bound in bounds.items():
            value = request.model_dump()[name] if name == "num_return_sequences" else given.get(name)
            if value is not None and value > bound:
                raise ValueError(f"{name} is {value}; here it is at most {bound}")
        if request.seed is not None and not sampling:
            raise ValueError(f"seed={request.seed} has no effect without do_sample")
        rows = max(beams, request.num_return_sequences, given.get("top_k", 4) if contrasting else 1)
        return Settings(
            generation=tuple(sorted({"max_new_tokens": self.default_max_new_tokens, **given}.items())),
            num_return_sequences=request.num_return_sequences,
            rows=rows,
            scores=request.scores,
            source_lang=request.source_lang,
            target_lang=request.target_lang,
            seed=request.seed,
        )

    def decode(self, texts: list[str], settings: Settings, seconds: float) -> list[list[Hypothesis]]:
        """Translate one batch, in the model's thread; give up when nobody waits any more."""
        # Outside, the random state stays as it is: outputs without a seed must not repeat after one with a seed.
        with torch.random.fork_rng() if settings.seed is not None else nullcontext():
            if settings.seed is not None:
                torch.manual_seed(settings.seed)
            return translate(
                self.model,
                self.processing_class,
                texts,
                source_lang=settings.source_lang,
                target_lang=settings.target_lang,
                batch_size=len(texts),
                num_return_sequences=settings.num_return_sequences,
                scores=settings.scores,
                max_time=max(seconds, 0) + 1,  # later than the time-out, so that nobody gets half an output
                **dict(settings.generation),
            )

    def describe(self) -> dict[str, Any]:
        """What the model is, what it was trained on, and what the server takes."""
        experiment = Path(self.name) / EXPERIMENT_FILE
        data = parse_mapping(experiment.read_text("utf-8"), experiment.name)["data"] if experiment.is_file() else {}
        trained_on = {split: data_name(data[split]) for split in ("train", "validation", "test") if data.get(split)}
        defaults = self.model.generation_config.to_diff_dict()
        return {
            "name": Path(self.name).name,
            "model_type": self.model.config.model_type,
            "class": type(self.model).__name__,
            "parameters": self.model.num_parameters(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "trained_on": trained_on or None,
            "source_languages": languages(self.processing_class, "source"),
            "target_languages": languages(self.processing_class, "target"),
            "generation_defaults": {name: value for name, value in defaults.items() if not name.startswith("_")},
            "limits": {**asdict(self.limits), "max_tokens": self.max_tokens, "max_new_tokens": self.max_new_tokens},
        }


class Door:
    """ASGI middleware: counts requests by status and refuses bodies that are too large, before they are in memory."""

    def __init__(self, app: Any, metrics: Metrics, max_body_bytes: int) -> None:
        self.app, self.metrics, self.max_body_bytes = app, metrics, max_body_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, received = time.perf_counter(), 0
        path = scope["path"] if scope["path"] in PATHS else "other"
        announced = dict(scope["headers"]).get(b"content-length", b"0")

        async def limited_receive() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if max(received, int(announced) if announced.isdigit() else 0) > self.max_body_bytes:
                raise HTTPException(413, f"the body is larger than {self.max_body_bytes} bytes")
            return message

        async def counting_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests[path, message["status"]] += 1
                if path == "/translate":
                    self.metrics.request_seconds.observe(time.perf_counter() - start)
            await send(message)

        try:
            await self.app(scope, limited_receive, counting_send)
        except Exception:  # answered further out
            self.metrics.requests[path, 500] += 1
            raise


def create_app(model: PreTrainedModel, processing_class: ProcessingClass, name: str, limits: Limits) -> FastAPI:
    """The application: POST /translate; GET /health, /metrics, /model, /docs, /openapi.json. Its batcher is in `state`.

    Args:
        model, processing_class: as `load` gives them.
        name: folder or name on the Hub.
    """
    translator = Translator(model, processing_class, name, limits)
    metrics = Metrics()
    batcher = Batcher(translator.decode, limits, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    # The pages that FastAPI has for documentation load their scripts from elsewhere; /docs below needs no network.
    app = FastAPI(title="Dragoman", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.batcher = batcher
    app.add_middleware(Door, metrics=metrics, max_body_bytes=limits.max_body_bytes)
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": description}
        for status, description in {
            400: "The body is no JSON.",
            413: "The body is too large.",
            422: "A field or an option is wrong.",
            503: "The queue is full, or the server is stopping; Retry-After says when to come again.",
            504: "The time-out has passed.",
        }.items()
    }

    @app.post("/translate", responses=problems)
    async def translate_texts(request: Request, body: TranslationRequest) -> TranslationResponse:
        """Translate one text or several."""
        texts = [body.text] if isinstance(body.text, str) else body.text
        try:
            settings = translator.settings(body)
            tokens = translator.count_tokens(texts, body.source_lang)
            work = asyncio.ensure_future(batcher.answer(texts, tokens, settings))
            gone = asyncio.ensure_future(_disconnected(request))
            try:
                await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                work.cancel()  # nothing, where it is done
            found = await work
        except ValueError as error:
            raise HTTPException(422, _presentable(one_line(error))) from error
        except QueueFull as error:
            raise HTTPException(503, "the queue is full: come again later", RETRY_AFTER) from error
        except Stopped as error:
            raise HTTPException(503, "the server is not ready: it is stopping", RETRY_AFTER) from error
        except TimeoutError as error:
            raise HTTPException(504, f"no answer within {limits.timeout:g} seconds: send less at once") from error
        except asyncio.CancelledError:
            if not gone.done():
                raise
            raise HTTPException(499, "the client has gone") from None
        return TranslationResponse(
            outputs=[
                [
                    Output(
                        text=one.text, score=one.score, log_probability=one.log_probability, tokens=len(one.token_ids)
                    )
                    for one in hypotheses
                ]
                for hypotheses in found
            ]
        )

    @app.get("/health", responses={503: {"model": Problem}})
    async def health() -> dict[str, str]:
        """200 while requests are taken, 503 otherwise."""
        if not batcher.running:
            raise HTTPException(503, "not ready: the server is stopping")
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def numbers() -> Response:
        """Counters and histograms in the text format of Prometheus."""
        return Response(metrics.text(len(batcher)), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/model")
    async def about() -> dict[str, Any]:
        """What the model is, what it was trained on, and the limits of a request."""
        return translator.describe()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        status, sentence = _sentence(error.errors())
        return JSONResponse({"detail": _presentable(sentence)}, status)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "the server failed; its log says why"}, 500)

    return app


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _presentable(sentence: str) -> str:
    """Without what UTF-8 cannot express, and of bounded length: it may quote the request."""
    sentence = sentence.encode("utf-8", "backslashreplace").decode("utf-8")
    return sentence if len(sentence) <= 400 else f"{sentence[:400]}…"


def _sentence(errors: Sequence[Any]) -> tuple[int, str]:
    """The first of pydantic's errors -> status and sentence."""
    kind, path, message = errors[0]["type"], errors[0]["loc"][1:], errors[0]["msg"]
    if kind == "json_invalid":
        return 400, f"the body is no valid JSON: {errors[0]['ctx']['error']} at character {path[0]}"
    if not path:
        return 422, 'the body must be a JSON object such as {"text": "..."}, sent as application/json'
    if kind == "extra_forbidden":
        closest = nearest(str(path[0]), list(TranslationRequest.model_fields))
        return 422, f"unknown field '{path[0]}'; the nearest valid one is '{closest}'"
    if path[0] == "text" and kind != "missing":
        return 422, "text must be a text or a list of texts"
    return 422, f"{path[0]}: {message[0].lower()}{message[1:]}"


def docs_page(schema: dict[str, Any]) -> str:
    """An OpenAPI schema as a page of plain HTML, without scripts."""
    parts = []
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2>{method.upper()} {path}</h2><p>{escape(operation['description'])}</p><ul>")
            for status, response in operation["responses"].items():
                parts.append(f"<li>{status}: {escape(response['description'])}</li>")
            parts.append("</ul>")
    for name, model in schema["components"]["schemas"].items():
        parts.append(f"<h2>{name}</h2><p>{escape(model.get('description', ''))}</p><table>")
        for field, about in model["properties"].items():
            required = "required" if field in model.get("required", ()) else ""
            cells = [f"<code>{field}</code>", _type_name(about), required, escape(about.get("description", ""))]
            parts.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        parts.append("</table>")
    example = "curl -s localhost:8000/translate -H 'Content-Type: application/json' -d '{\"text\": \"Open the page\"}'"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Dragoman</title>'
        "<style>body{font:16px sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "td{padding:.2rem .8rem .2rem 0;vertical-align:top}pre{overflow-x:auto}</style>"
        f'<h1>Dragoman</h1><pre>{escape(example)}</pre><p><a href="openapi.json">openapi.json</a> has the same for '
        f"programs.</p>{''.join(parts)}</html>"
    )


def _type_name(about: dict[str, Any]) -> str:
    if "anyOf" in about:
        return " or ".join(_type_name(part) for part in about["anyOf"])
    if about.get("type") == "array":
        return f"list of {_type_name(about['items'])}"
    return about.get("const") or about.get("type") or about["$ref"].rpartition("/")[2]


class _Server(uvicorn.Server):
    """Says when it is ready, and when it is to stop lets no sentence wait for others.

    A subclass, because uvicorn tells the application that it stops only when all requests are answered.
    """

    def __init__(self, config: uvicorn.Config, batcher: Batcher) -> None:
        super().__init__(config)
        self.batcher = batcher

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.batcher.hurry()
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"ready: http://{host}:{port} (POST /translate; GET /docs explains)", flush=True)


def serve(
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str | None = None,
    revision: str | None = None,
    limits: Limits | None = None,
) -> None:
    """Serve a model until SIGTERM or SIGINT; then finish what was taken, and return.

    Args:
        name: folder of a saved model, or its name on the Hub.
        port: 0 takes a free one.
        device, revision: as in `load`.

    Raises:
        OSError: the port is taken, or the host is none of this machine's addresses.
        FileNotFoundError, ValueError: as `load`.
    """
    limits = limits or Limits()
    listener = _bind(host, port)  # first, because it fails in no time
    app = create_app(*load(name, device, revision=revision), name, limits)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(limits.timeout) + 5)
    # uvicorn raises the signal again after its graceful end, for handlers like these.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _Server(config, app.state.batcher).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}, port {port} ({error.strerror}): choose another --port or --host"
        ) from error
    return listener
