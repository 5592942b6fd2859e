"""What a run does before its first step: who reads what, the frozen backbone's part, the classifier."""

import os
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from castream.data.loader import ReaderSettings, StreamLoader
from castream.data.opening import Split
from castream.data.sharding import ShardPlan
from castream.data.transforms import ImageTransform
from castream.evaluation import EvaluationSettings
from huggingface_hub import get_token
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm

from modeling_castream import CAStreamConfig

from .arguments import TrainingArguments
from .features import CachedLoader, build_cache, prepare_cache
from .heldout import HeldOut, pixel_batches
from .interruption import InterruptedRun, Interruption
from .model import save_model, set_classifier
from .objectives import Objective
from .probe import fit_linear_classifier, pooled_features
from .run_folder import RunFolder
from .steps import to_device
from .watching import MIN_ROWS, check_bad_images, check_readable

MAX_WORKERS = 8


def own_cpus() -> int:
    """This process's share of the machine's CPUs."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def default_threads() -> int:
    """Threads for computing: what OMP_NUM_THREADS says, which `accelerate launch` sets to 1; else this process's CPUs.

    One is slower on an idle machine but far quicker on a busy one, where all threads wait for the one that has no CPU.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() else own_cpus()


def check_end(args: TrainingArguments, accelerator: Accelerator) -> EvaluationSettings:
    """Refuse at the start what would only fail at the end of a run.

    Raises:
        ValueError: on an evaluation that cannot be run, a repository's name or token that cannot be pushed with, or a
            tracker that is not installed; in one line.
    """
    if args.tracker != "none" and args.tracker not in map(str, get_available_trackers()):  # accelerate goes on without
        raise ValueError(f"tracker={args.tracker} is not installed: pip install {args.tracker}, or set tracker=none.")
    if args.push_to_hub:
        validate_repo_id(args.hub_model_id)
        if accelerator.is_main_process and not get_token():
            raise ValueError("push_to_hub=true needs a token: log in with `hf auth login`, or set HF_TOKEN.")
    precision = accelerator.mixed_precision
    return EvaluationSettings(
        methods=args.evaluation_methods,
        metrics=args.evaluation_metrics,
        controls=args.evaluation_controls,
        max_images=args.evaluation_images,
        autocast={"no": "off", None: "off"}.get(precision, precision),
        seed=args.seed,
    )


def match_labels(
    args: TrainingArguments,
    accelerator: Accelerator,
    split: Split,
    held_out: HeldOut | None,
    config: CAStreamConfig,
    unfitted: bool,
) -> Split:
    """Bring the labels of both splits in line with the model's classes, before any long work.

    Args:
        unfitted: whether a classifier is to be fitted to the training split's labels.

    Returns:
        The training split, without its labels where nothing needs them.

    Raises:
        ValueError: where the classes do not fit, or a label is none of them.
    """
    if args.objective != "cross_entropy" and not unfitted:
        split = replace(split, label_column=None)
    try:
        split = split.match_classes(config.id2label)
        if held_out:
            held_out.split = held_out.split.match_classes(config.id2label)
    except ValueError as error:
        raise ValueError(f"{error} Name the right label_column, or fit the model to them: classifier=fit.") from None
    if accelerator.is_main_process:
        split.check_labels(config.num_labels)
        if held_out:
            held_out.split.check_labels(config.num_labels, may_lack=True)
    return split


def make_loader(
    args: TrainingArguments, accelerator: Accelerator, split: Split, image_processor, num_labels: int
) -> tuple[StreamLoader, dict, int]:
    """The loader of this process, what a place in its data depends on, and the number of images in the split.

    Raises:
        ValueError: where the size of the split is unknown, or a process would have nothing to read.
    """
    num_rows = args.train_examples or split.num_rows
    if num_rows is None:
        raise ValueError("the dataset does not tell its size: give the number of its training images, train_examples.")
    workers = min(MAX_WORKERS, max(0, own_cpus() - 1)) if args.num_workers is None else args.num_workers
    world = accelerator.num_processes
    plan = ShardPlan(split.stream.num_shards, world, max(1, workers), args.seed, by_rows=split.unsplittable)
    accelerator.print(f"data: {plan.describe(num_rows)}")
    settings = ReaderSettings(args.batch_size, args.shuffle_window, args.interleave, args.views, num_labels, args.seed)
    transform = ImageTransform(image_processor, args.augmentation)
    loader = StreamLoader(split, plan, accelerator.process_index, transform, settings, in_process=workers == 0)
    layout = {
        "processes": world,
        "readers": plan.busy_workers,
        "shards": plan.num_shards,
        "cached": args.cache_features,
    }
    return loader, layout | {"batch_size": args.batch_size, "precision": accelerator.mixed_precision}, num_rows


def cache_features(
    args: TrainingArguments,
    accelerator: Accelerator,
    folder: RunFolder,
    objective: Objective,
    loader: StreamLoader,
    layout: dict,
    num_rows: int,
    interruption: Interruption,
) -> CachedLoader:
    """Run the backbone over every view once, and keep what it says on the disk, which all processes share.

    Raises:
        ValueError: where that takes too much space, or too many images do not decode.
        InterruptedRun: when told to stop; what is written is kept.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    if accelerator.is_main_process:
        prepare_cache(folder.features, layout)
    accelerator.wait_for_everyone()
    bar = tqdm(
        total=num_rows * args.views, unit="img", desc="caching features", disable=not accelerator.is_main_process
    )

    bad = set()

    def advance(images: int) -> None:
        bar.update(images * world)
        bad.update(loader.bad)
        if loader.rows > MIN_ROWS:
            check_bad_images(args, folder, len(bad), loader.rows)
        if interruption.requested:
            raise InterruptedRun("stopped while caching features: the same command goes on from there")

    with bar, accelerator.autocast():
        limit = args.cache_limit_gib * 2**30
        options = {"views": args.views, "rank": rank, "limit_bytes": limit, "num_rows": num_rows}
        build_cache(folder.features, objective, loader, **options, on_batch=advance)
    accelerator.wait_for_everyone()
    cached = CachedLoader(folder.features, args.views, rank, world, args.batch_size, args.seed)
    if accelerator.is_main_process:
        folder.note_bad_images(cached.unreadable)
    check_bad_images(args, folder, len(cached.unreadable), len(cached) + len(cached.unreadable))
    check_readable(len(cached))
    return cached


def fit_classifier(
    args: TrainingArguments,
    accelerator: Accelerator,
    folder: RunFolder,
    objective: Objective,
    loader: StreamLoader | CachedLoader,
    image_processor,
) -> None:
    """Give the model a linear classifier for the dataset's classes, fitted to its GAP features; save it as `initial`.

    Raises:
        OSError: where that cannot be written.
    """
    model = objective.model
    batches = (to_device(batch, accelerator.device) for batch, _ in loader.epoch(0))
    features, labels = pooled_features(accelerator, model, batches, objective)
    check_readable(len(labels))
    loader.rows, loader.bad = 0, []  # training reads, counts and lists them again
    set_classifier(model, *fit_linear_classifier(features, labels, model.config.num_labels, args.classifier_l2))
    accelerator.print(f"fitted a linear classifier for {model.config.num_labels} classes to {len(labels)} images")
    if accelerator.is_main_process:
        save_model(folder.initial, model, image_processor)
    accelerator.wait_for_everyone()


def watched_images(
    accelerator: Accelerator, objective: Objective, held_out: HeldOut | None, image_processor, count: int
) -> list[torch.Tensor]:
    """The first few held-out images, as normalised batches on the device: to see what the attention does."""
    if held_out is None:
        return []
    batches = pixel_batches(held_out, ImageTransform(image_processor, "none"), count)
    return [objective.normalize(to_device(batch, accelerator.device)) for batch in batches]
