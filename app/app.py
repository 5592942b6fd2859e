"""A page on which anyone sees what an image classifier with a CA-Stream looks at.

    python app/app.py --model DIR

runs it on this machine alone. In a Space, model.json beside this file names the model.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# Asked for before gradio is imported: no statistics are sent anywhere.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# Before torch is imported: threads that wait for one another sleep, or visitors at once take the cores from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HERE = Path(__file__).parent


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="DIR_OR_ID", help="model folder or Hub id; default: what model.json beside the app names")
    add("--revision", help="commit, branch or tag of a Hub id")
    add("--port", type=int, help="default: the first free one from 7860 on")
    return parser


def choose_model(model: str | None, revision: str | None) -> tuple[str, str | None]:
    """The model to show, and its revision.

    Raises:
        ValueError: where none is named.
    """
    if model is not None:
        return model, revision
    path = HERE / "model.json"
    if not path.is_file():
        raise ValueError("no model: give --model DIR, a folder with a CAStream model, or a Hub id.")
    chosen = json.loads(path.read_text(encoding="utf-8"))
    return chosen["model"], revision or chosen.get("revision")


def load(model: str, revision: str | None):
    """The pipeline and the page's title.

    Raises:
        ValueError: where there is no such model.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if not os.path.isdir(model) and (os.path.isabs(model) or model.count("/") != 1):
        raise ValueError(f"no model: {model} is neither a folder nor a Hub id USER/NAME.")
    options = {"revision": revision, "trust_remote_code": True}
    try:
        network, info = AutoModelForImageClassification.from_pretrained(
            model, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        task = getattr(network.config, "custom_pipelines", {})["image-explanation"]
        pipe = get_class_from_dynamic_module(task["impl"], model, revision=revision)(
            model=network,
            image_processor=AutoImageProcessor.from_pretrained(model, **options),
            task="image-explanation",
        )
    except KeyError as error:
        raise ValueError(f"{model} does not explain images: give a CAStream model.") from error
    except Exception as error:  # remote code, network and files may raise anything
        raise ValueError(f"{model} does not load: {' '.join(str(error).split())}") from error
    unfit = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    if unfit:
        raise ValueError(f"{model} does not load: {len(unfit)} weights do not fit its config.json, such as {unfit[0]}.")
    return pipe, Path(model).resolve().name if os.path.isdir(model) else model


def main(arguments: list[str] | None = None) -> int:
    """Run the page until it is interrupted; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        pipe, title = load(*choose_model(options.model, options.revision))
        from explanation import Explainer  # they take seconds, which a wrong name need not wait for
        from page import LARGEST_UPLOAD, MOST_SESSIONS, THEME, build_page

        page = build_page(Explainer(pipe), title)
    except ValueError as error:
        print(f"app: {error}", file=sys.stderr)
        return 1
    try:
        page.queue(default_concurrency_limit=2, max_size=64).launch(
            server_port=options.port,
            max_file_size=LARGEST_UPLOAD,
            state_session_capacity=MOST_SESSIONS,
            footer_links=[],
            theme=THEME,
            css_paths=[HERE / "page.css"],
            share=False,
        )
    except OSError as error:
        remedy = "give another --port" if options.port else "give --port a free one"
        print(f"app: the page cannot be served, {remedy}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
