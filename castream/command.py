"""`castream COMMAND ...`: one thin sub-command per room, each imported when it runs, so that --help is instant."""

import gc
import importlib.util
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "pypi:efficientnet-lite0"
# A command with these settings hands all of its options, --help included, to the room's own parser.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    help="See what an image classifier looks at.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def explain(
    photos: Annotated[list[str], typer.Argument(metavar="PHOTO...", help="Photos, folders of them, or patterns.")],
    model: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="A castream model or any classifier that `castream convert` takes: folder, Hub id, timm:NAME, ... "
            "A classifier is converted once, proved to be the same, and kept.",
        ),
    ] = DEFAULT_MODEL,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", metavar="METHOD", help="Saliency method; default: grad_cam. May repeat."),
    ] = None,
    pooling: Annotated[
        list[str] | None,
        typer.Option(
            "--pooling", metavar="POOLING", help="ca, or source: the source's own (gap, if an average). May repeat."
        ),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="CLASS", help="Class to explain, label or id. May repeat.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many of the most likely classes to explain.")] = 3,
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder for overlays and contact sheet.")] = "explained",
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Opacity of the overlays' colours.")] = 0.5,
):
    """Write what speaks for the most likely classes of photos: overlays, and a contact sheet of them all."""
    # Before torch is imported: on a busy machine, threads that spin while they wait take the CPU from one another.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from castream.artifacts.process import keep_freed_memory

    with _importing():
        from .explain import run

    keep_freed_memory()
    status = run(
        photos, model, output, method=method or "grad_cam", pooling=pooling, target=target, top_k=top_k, alpha=alpha
    )
    raise typer.Exit(status)


@app.command(context_settings=PASS_ON)
def convert(context: typer.Context):
    """Turn a pretrained classifier into a castream model, and prove that it is the same."""
    from castream.conversion.command import main

    arguments = context.args
    if not arguments or arguments[0] not in ("classifier", "official"):
        arguments = ["classifier", *arguments]
    raise typer.Exit(main(arguments, prog="castream convert"))


@app.command(context_settings=PASS_ON)
def onnx(context: typer.Context):
    """Export a castream model as an ONNX file, and verify that."""
    _need("onnx", "onnx", "onnxscript", "onnxruntime")
    from castream.conversion.command import main

    raise typer.Exit(main(["onnx", *context.args], prog="castream"))


@app.command(context_settings=PASS_ON)
def evaluate(context: typer.Context):
    """Measure saliency maps on a dataset, with intervals and controls."""
    from castream.evaluation.command import main

    raise typer.Exit(main(context.args, prog="castream evaluate"))


@app.command(context_settings=PASS_ON)
def train(context: typer.Context):
    """Train a stream under accelerate; a recipe goes by its file's name: --config photos_distill.yaml."""
    _need("train", "accelerate", "tensorboard")
    command = ["accelerate", "launch", "-m", "castream.training", *map(_recipe, context.args)]
    if not {"-h", "--help"} & set(context.args):
        print(
            f"{shlex.join(command)}\n(the same by hand; `accelerate launch` takes --num_processes and more)", flush=True
        )
    # Nothing stands between the terminal and the launcher: its signals and its exit status are the command's.
    os.execv(sys.executable, [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]])


@app.command(context_settings=PASS_ON)
def publish(context: typer.Context):
    """Publish a model folder on the Hugging Face Hub, with its card and results."""
    from castream.publishing.command import main

    raise typer.Exit(main(context.args, prog="castream publish"))


@app.command("app", context_settings=PASS_ON)
def show_app(context: typer.Context):
    """Show the page on which people explain photos of their own."""
    _need("app", "gradio")
    # The page's files import one another as in a Space, flat: they run as a script of their own.
    script = _room_folder("app") / "app.py"
    os.execv(sys.executable, [sys.executable, str(script), *context.args])


@contextmanager
def _importing() -> Iterator[None]:
    """Imports without a search for garbage, a fifth of the time of torch's and transformers'."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _room_folder(room: str) -> Path:
    """The folder of a room: rooms lie side by side, in a checkout as in an installation."""
    from castream import artifacts

    return Path(artifacts.__file__).parents[1] / room


def _recipe(argument: str) -> str:
    """The path of the recipe that an argument names, or the argument as it is."""
    recipe = _room_folder("recipes") / os.path.basename(argument)
    return str(recipe) if recipe.suffix == ".yaml" and recipe.is_file() and not os.path.exists(argument) else argument


def _need(extra: str, *packages: str) -> None:
    """End with one line where a package of an extra is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        print(f"castream: {', '.join(missing)} is not installed: pip install 'castream[{extra}]'", file=sys.stderr)
        raise typer.Exit(2)


def main() -> None:
    """Run a command, and end the process with its status."""
    app(prog_name="castream")
