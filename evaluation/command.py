"""Evaluate a model's saliency maps on a dataset: `python -m evaluation --help`."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .settings import (
    AUTOCASTS,
    CONTROLS,
    METRICS,
    PAIRED_CONTROLS,
    PAPER_METRICS,
    POOLINGS,
    PROTOCOLS,
    STABLE_CHANGES,
    TARGETS,
    EvaluationSettings,
)

ROLES = ("image", "label", "mask", "boxes", "id")  # of a dataset's columns

EPILOG = """examples:
  python -m evaluation --model DIR --dataset imagenet-1k --split validation --output results
  python -m evaluation --model DIR --dataset PHOTOS --split heldout --output results     (the folder PHOTOS/heldout)
  python -m evaluation --model DIR --dataset imagefolder --data-files 'photos/**' --split train --output results
  python -m evaluation --model DIR --dataset DATA --split test --output results --controls   (all controls)
  python -m evaluation --model DIR --dataset DATA --split test --metrics mask_share pointing_game --output results
  accelerate launch -m evaluation --model DIR ...        (several processes; every image is counted once)

A killed run goes on where it was when the same command is started again. It writes results.json, results.md,
per_image.parquet, examples.png and curves.png into the output folder. evaluation/README.md defines every figure.
"""


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command's options."""
    defaults = EvaluationSettings()
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Evaluate the saliency maps of a CA-Stream model under global average pooling and cross-attention.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub id of a CAStream classifier, with its image processor")
    add(
        "--dataset",
        required=True,
        help="folder, zip, file or address of photos, parquet or tar shards; Hub id; builder",
    )
    add("--split", required=True, help="split of the dataset, such as validation")
    add(
        "--output",
        required=True,
        type=lambda path: Path(path).expanduser(),
        metavar="DIR",
        help="folder for the results",
    )
    _add_table_options(parser, defaults)
    _add_run_options(parser, defaults)
    _add_dataset_options(parser)
    return parser


def _add_table_options(parser: argparse.ArgumentParser, defaults: EvaluationSettings) -> None:
    """Which rows and columns the table has."""
    from modeling_castream.methods_castream import METHODS

    add = parser.add_argument
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        help=_names(METHODS, defaults.methods),
    )
    add(
        "--poolings",
        nargs="+",
        choices=POOLINGS,
        metavar="POOLING",
        help=f"{_names(POOLINGS, defaults.poolings)}, or source ca where the source averages nothing",
    )
    add(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=PAPER_METRICS,
        metavar="METRIC",
        help=_names(METRICS, PAPER_METRICS),
    )
    add(
        "--controls",
        nargs="*",
        choices=CONTROLS,
        metavar="CONTROL",
        help=f"alone for all, or some out of {', '.join(CONTROLS)}; default: none",
    )
    add(
        "--protocol",
        choices=PROTOCOLS,
        default=defaults.protocol,
        metavar="PROTOCOL",
        help="reference (the paper's, to the digit), stable, or one of stable's changes alone: "
        f"{', '.join(STABLE_CHANGES)}; default: %(default)s",
    )


def _add_run_options(parser: argparse.ArgumentParser, defaults: EvaluationSettings) -> None:
    """What is explained, and how it is run."""
    add = parser.add_argument
    add(
        "--target",
        choices=TARGETS,
        default=defaults.target,
        help="class that is explained; without a label it is the predicted one; default: %(default)s",
    )
    add("--batch-size", type=int, default=defaults.batch_size, help="images per forward pass; default: %(default)s")
    add("--max-images", type=int, help="stop after this many images; default: all")
    add("--num-examples", type=int, default=defaults.num_examples, help="images in examples.png; default: %(default)s")
    add("--seed", type=int, default=defaults.seed, help="of controls and intervals; default: %(default)s")
    add("--autocast", choices=AUTOCASTS, default=defaults.autocast, help="backbone's precision; default: %(default)s")


def _add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """Options for datasets whose name alone does not say it all."""
    parser.add_argument("--config-name", help="the dataset's configuration")
    parser.add_argument("--data-files", nargs="+", metavar="PATTERN", help="files of a builder, such as 'photos/**'")
    for role in ROLES:
        parser.add_argument(f"--{role}-column", help=f"the dataset's {role} column, where its name is unusual")


def _names(names: tuple[str, ...], default: tuple[str, ...]) -> str:
    return f"out of {', '.join(names)}; default: {', '.join(default) or 'none'}"


def _controls(named: list[str] | None, poolings: Sequence[str]) -> tuple[str, ...]:
    """The controls that an option stands for; without a name, all that the poolings allow."""
    if named is None:
        return ()
    both = len(set(poolings)) == 2
    return tuple(named) or tuple(name for name in CONTROLS if both or name not in PAIRED_CONTROLS)


def main(arguments: list[str] | None = None, prog: str = "python -m evaluation") -> int:
    """Run the command; returns the exit status."""
    parser = build_parser(prog)
    options = parser.parse_args(arguments)
    words = [*parser.prog.split(), *(sys.argv[1:] if arguments is None else arguments)]
    home = os.path.expanduser("~") + "/"  # whose it is says nothing to a reader of the results
    options.command = shlex.join(word.replace(home, "~/") for word in words)
    try:
        _evaluate(options)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"evaluation: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evaluation: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    # Checked before anything slow is imported or loaded.
    values = {name: getattr(options, name) for name in EvaluationSettings.names()}
    chosen = {name: value for name, value in values.items() if value not in (None, [])}
    settings = EvaluationSettings(**chosen)
    settings = replace(settings, controls=_controls(options.controls, settings.poolings))

    from accelerate import Accelerator
    from castream.artifacts.models import load_image_processor, load_model
    from castream.artifacts.process import keep_freed_memory
    from castream.data.opening import open_split

    from .data import read_examples
    from .run import evaluate_saliency

    keep_freed_memory()
    accelerator = Accelerator()
    model, image_processor = load_model(options.model), load_image_processor(options.model)
    settings = settings.for_model(model.config, named=chosen)
    split = open_split(
        options.dataset,
        options.split,
        config=options.config_name,
        data_files=options.data_files,
        columns={role: getattr(options, f"{role}_column") for role in ROLES},
    )
    examples = read_examples(split, id2label=model.config.id2label)
    if accelerator.is_main_process and examples.note:
        print(f"data: {examples.note}", file=sys.stderr)
    report = evaluate_saliency(
        model,
        image_processor,
        examples,
        settings,
        options.output,
        accelerator,
        model_name=options.model,
        command=options.command,
    )
    if accelerator.is_main_process:
        print(report.markdown())
        print(f"Written to {options.output}: {', '.join(sorted(path.name for path in options.output.iterdir()))}")
