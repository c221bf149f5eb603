"""`dragoman demo` and `serve`: a model behind a page and behind HTTP."""

from typing import Annotated

import typer

from dragoman.apps.limits import Limits
from dragoman.cli.options import Device, Host, Model, Models, Revision
from dragoman.cli.terminal import quiet_bars


commands = typer.Typer()


@commands.command(
    short_help="Serve a page on which to try models and see where they look.",
    epilog="""\b
Example:
  dragoman demo runs/quickstart --port 7861""",
)
def demo(
    models: Models,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    revision: Revision = None,
    device: Device = None,
) -> None:
    """Serve a page on which to try models, and to see where they look."""
    from dragoman.apps.demo import serve

    quiet_bars()
    serve(models, host, port, device, revision)


@commands.command(
    short_help="Answer requests over HTTP, decoded together.",
    epilog="""\b
Example:
  dragoman serve runs/quickstart --port 8000 --max-batch-size 64""",
)
def serve(
    model: Model,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    revision: Revision = None,
    device: Device = None,
    max_batch_size: Annotated[int, typer.Option(help="Sentences decoded together.")] = Limits.max_batch_size,
    max_batch_tokens: Annotated[
        int, typer.Option(help="Source tokens decoded together, padding and beams included.")
    ] = Limits.max_batch_tokens,
    max_wait_ms: Annotated[
        float, typer.Option(help="How long a sentence waits for others while the model is idle.")
    ] = Limits.max_wait_ms,
    max_queue: Annotated[int, typer.Option(help="Sentences that wait; more are refused.")] = Limits.max_queue,
    timeout: Annotated[float, typer.Option(help="Seconds from a request to its answer.")] = Limits.timeout,
    max_texts: Annotated[int, typer.Option(help="Texts of a request.")] = Limits.max_texts,
    max_characters: Annotated[int, typer.Option(help="Characters of a text.")] = Limits.max_characters,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a text.")] = Limits.max_tokens,
    max_body_bytes: Annotated[int, typer.Option(help="Bytes of a request.")] = Limits.max_body_bytes,
    max_beams: Annotated[
        int, typer.Option(help="Beams; also outputs per text, and candidates of contrastive search.")
    ] = Limits.max_beams,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an output.")] = Limits.max_new_tokens,
) -> None:
    """Answer translation requests over HTTP, decoding those together that wait together; GET /docs explains."""
    from dragoman.apps.server import serve as run

    quiet_bars()
    limits = Limits(
        max_batch_size=max_batch_size,
        max_batch_tokens=max_batch_tokens,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        timeout=timeout,
        max_texts=max_texts,
        max_characters=max_characters,
        max_tokens=max_tokens,
        max_body_bytes=max_body_bytes,
        max_beams=max_beams,
        max_new_tokens=max_new_tokens,
    )
    run(model, host=host, port=port, device=device, revision=revision, limits=limits)
