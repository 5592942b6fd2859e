"""A training run from its settings to its model card: the story, and the commands' way into it."""

import os
import sys
import time
from dataclasses import asdict
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from castream.artifacts.files import read_json
from castream.artifacts.models import load_image_processor, load_model
from castream.artifacts.process import compute_threads, keep_freed_memory, own_cpus
from castream.data.loader import ReaderSettings, StreamLoader
from castream.data.opening import Split, UnknownClassesError, open_scenes, open_split
from castream.data.sharding import ShardPlan
from castream.data.transforms import ImageTransform, pixel_statistics
from castream.evaluation import EvaluationSettings
from castream.publishing import PublishError, publish, write_model_card
from huggingface_hub import get_token
from huggingface_hub.utils import validate_repo_id
from timm.optim import param_groups_weight_decay
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from modeling_castream import CAStreamConfig, CAStreamForImageClassification

from .arguments import TrainingArguments, parse_arguments
from .checkpoint import Checkpointer, Progress
from .evaluation import ENTROPY_IMAGES, HeldOut, evaluate, evaluate_precision, first_batches, measure_entropy
from .feature_cache import CachedLoader, FeatureCache
from .logging import BadImages, MetricLogger, WeightCheck
from .loop import InterruptedRun, Interruption, Schedule, Steps, Update, WeightAverage
from .model import TRAINING_FILE, adapt_model, fit_classifier, load_source, save_model, unfreeze
from .objective import Mixer, Objective
from .precision import choose_precision
from .run_folder import RunFolder

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: not finished, try again
MAX_WORKERS = 8


def run(argv: list[str] | None = None) -> int:
    """Run the command, with what a user can mend reported in one line.

    Args:
        argv: its words; None for those of this process.

    Returns:
        The exit code.
    """
    try:
        main(parse_arguments(argv))
    except InterruptedRun as stopped:
        tqdm.write(f"train.py: {stopped}", file=sys.stderr)  # on a line of its own, whatever bar was being drawn
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        if os.environ.get("CASTREAM_TRACEBACK"):
            raise
        tqdm.write(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def main(args: TrainingArguments) -> None:
    """Train, evaluate, describe and publish a model, from wherever the run in `output_dir` stands."""
    started, interruption = time.time(), Interruption()
    args = choose_precision(args)
    accelerator = start_accelerator(args)
    settings = check_end(args, accelerator)
    folder = RunFolder(args.output_dir, asdict(args), accelerator.is_main_process)
    accelerator.wait_for_everyone()
    folder.check_shared()
    set_seed(args.seed)
    bad_images = BadImages(accelerator, folder.note_bad_images, folder.bad_images, args.max_bad_fraction)
    session = Session(accelerator, folder, interruption, bad_images)

    split, held_out = open_dataset(args, args.train_split), None
    if args.validation_split:
        held_out = HeldOut(open_dataset(args, args.validation_split), args.validation_split)

    model, image_processor, needs_fit = find_model(args, folder, split)
    needs_labels = args.objective == "cross_entropy" or needs_fit
    split = match_labels(split if needs_labels else split.without_labels(), held_out, model.config)
    if accelerator.is_main_process:
        check_data(split, held_out, model.config)

    if folder.model.is_dir():
        accelerator.print(f"training is complete: {folder.model}")
    else:
        train(args, session, model, image_processor, needs_fit, split, held_out)
        model = load_model(folder.model)  # what is evaluated is what was saved, on every process

    if held_out and not (folder.evaluation / "results.json").is_file():
        if held_out.split.multi_label:
            evaluate_precision(accelerator, model, image_processor, held_out, args.batch_size, folder.path)
        names = {"model_name": args.model, "dataset_name": f"{args.dataset_name or 'scenes'}/{args.validation_split}"}
        evaluate(accelerator, model, image_processor, held_out, settings, folder.evaluation, **names)
    if accelerator.is_main_process:
        describe(args, folder)
        folder.release()
        if args.push_to_hub:
            push(folder, args.hub_model_id)
        print_end(folder, time.time() - started)
    accelerator.end_training()


def start_accelerator(args: TrainingArguments) -> Accelerator:
    """Devices, processes, precision and trackers."""
    disable_progress_bar()  # transformers shows one for every file of weights
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.tracker == "none" else args.tracker,
        project_dir=args.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(compute_threads())
        keep_freed_memory()
    return accelerator


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
    return EvaluationSettings(
        methods=args.evaluation_methods,
        metrics=args.evaluation_metrics,
        controls=args.evaluation_controls,
        max_images=args.evaluation_images,
        seed=args.seed,
    )


def find_model(args: TrainingArguments, folder: RunFolder, split: Split) -> tuple:
    """The model, its image processor, and whether its classifier is still to be fitted.

    From the run's folder, trained or untrained, where that has it; else `args.model` with the dataset's classes.
    """
    for ready in (folder.model, folder.initial):
        if ready.is_dir():
            return load_model(ready), load_image_processor(ready), False
    source, image_processor = load_source(args.model, args.model_checkpoint, args.variant)
    stream = {"variant": args.variant, "query": args.query, "num_attention_heads": args.num_attention_heads}
    stream |= {"init": args.init, "stream_layers": args.stream_layers, "unit_keys": args.unit_keys}
    stream |= {"preserve_norm": args.preserve_norm, "evidence_queries": args.evidence_queries}
    stream |= {"evidence_depths": args.evidence_depths if args.evidence_queries else None}
    model, needs_fit = adapt_model(source, split, args.classifier, stream, args.seed)
    model.config.freeze_backbone, model.config.freeze_classifier = args.freeze_backbone, args.freeze_classifier
    return model, image_processor, needs_fit


def num_classes(config: CAStreamConfig) -> int:
    """Class ids that a label may have; a single logit tells two classes apart."""
    return max(2, config.num_labels)


def open_dataset(args: TrainingArguments, split: str) -> Split:
    """A split of the run's dataset; the one to train on has labels where the objective needs them.

    Raises:
        ValueError: on a dataset, split or column that is not there; in one line.
    """
    if args.dataset_name is None:
        opened = open_scenes(split, args.seed, args.scenes_train, args.scenes_validation)
    else:
        opened = open_split(
            args.dataset_name,
            split,
            config=args.dataset_config,
            columns={"image": args.image_column, "label": args.label_column},
            class_names=args.class_names,
            beside=(args.train_split, args.validation_split),
            reshard=args.reshard,
        )
    if args.objective == "cross_entropy" and split == args.train_split:
        opened.require_labels("objective=cross_entropy", "objective=masked_distill needs none")
    return opened


def match_labels(split: Split, held_out: HeldOut | None, config: CAStreamConfig) -> Split:
    """The training split, and in place the held-out one, with labels in the order of the model's classes.

    Raises:
        ValueError: where the classes do not fit.
    """
    if config.num_labels == 1:
        return split
    try:
        if held_out:
            held_out.split = _match_held_out(held_out.split, config, needed=split.label_column is not None)
        return split.match_classes(config.id2label)
    except ValueError as error:
        raise ValueError(f"{error} Name the right label_column, or fit the model to them: classifier=fit.") from None


def _match_held_out(split: Split, config: CAStreamConfig, needed: bool) -> Split:
    try:
        return split.match_classes(config.id2label)
    except UnknownClassesError as error:
        if needed:
            raise
        return split.without_labels(f"{error} It is evaluated for the predicted classes.")


def check_data(split: Split, held_out: HeldOut | None, config: CAStreamConfig) -> None:
    """Look at the labels before any long work, and say what was left out or guessed.

    Raises:
        ValueError: where a label is no class of the model.
    """
    split.check_labels(num_classes(config))
    if held_out:
        held_out.split.check_labels(num_classes(config), may_lack=True)
    for note in (*split.notes, *(held_out.split.notes if held_out else ())):
        tqdm.write(f"data: {note}")


class Session(NamedTuple):
    """What the whole run shares: processes, folder, being told to stop, and images that do not decode."""

    accelerator: Accelerator
    folder: RunFolder
    interruption: Interruption
    bad_images: BadImages


def train(
    args: TrainingArguments,
    session: Session,
    model: CAStreamForImageClassification,
    image_processor,
    needs_fit: bool,
    split: Split,
    held_out: HeldOut | None,
) -> None:
    """Train a model from wherever the folder's run stands, and save it."""
    accelerator, folder = session.accelerator, session.folder
    trained = unfreeze(model, args.pooling == "ca", args.objective == "mass_fidelity", args.freeze_output_projection)
    model.castream.backbone.to(memory_format=torch.channels_last)
    if args.compile_backbone:
        model.castream.backbone.compile()
    pixels = pixel_statistics(image_processor)
    loss = {"loss": args.objective, "pooling": args.pooling, "label_smoothing": args.label_smoothing}
    masks = {"mask_kinds": args.mask_kinds, "mask_backgrounds": args.mask_backgrounds}
    objective = Objective(model, *pixels, **loss, **masks).to(accelerator.device)
    trained |= {f"surrogates.{name}": parameter for name, parameter in objective.surrogates.named_parameters()}

    opened = args, session, objective, split, image_processor
    if needs_fit and args.objective == "mass_fidelity":  # what masks leave of a prediction is the classifier's affair
        fit(session, objective, image_processor, open_data(*opened, quiet=True))
        needs_fit = False
    data = open_data(*opened)
    if args.cache_features:
        data = cache_features(args, session, objective, data)
    if needs_fit:
        fit(session, objective, image_processor, data)

    pictured = first_batches(objective, held_out, ImageTransform(image_processor, "none"), accelerator.device)
    facts = {"entropy_before": measure_entropy(model, pictured)}
    with session.interruption.deferred():
        progress = optimize(args, session, objective, trained, data, pictured)
        model.eval()
        if accelerator.is_main_process:
            facts |= {"entropy_after": measure_entropy(model, pictured), "layers": model.config.stream_layers}
            facts |= {"progress": asdict(progress), "entropy_images": ENTROPY_IMAGES}
            save_model(folder.model, model, image_processor, facts)
        accelerator.wait_for_everyone()


def fit(session: Session, objective: Objective, image_processor, data: "Data") -> None:
    """Fit the classifier on the training images, and keep the model, so that a killed run does not do it again."""
    fit_classifier(session.accelerator, objective, data.loader.epoch(0))
    if session.accelerator.is_main_process:
        save_model(session.folder.initial, objective.model, image_processor)
    session.accelerator.wait_for_everyone()


class Data(NamedTuple):
    """Training images of this process.

    Args:
        layout: what a place in the data depends on.
        num_images: of an epoch, over all processes.
    """

    loader: StreamLoader | CachedLoader
    layout: dict
    num_images: int


def open_data(
    args: TrainingArguments,
    session: Session,
    objective: Objective,
    split: Split,
    image_processor,
    quiet: bool = False,
) -> Data:
    """The training images, and who reads which of them, which is told unless `quiet`.

    Raises:
        ValueError: where the size of the split is unknown, or a process would have nothing to read.
    """
    accelerator, num_rows = session.accelerator, args.train_examples or split.num_rows
    if num_rows is None:
        raise ValueError("the dataset does not tell its size: give the number of its training images, train_examples.")
    workers = min(MAX_WORKERS, max(0, own_cpus() - 1)) if args.num_workers is None else args.num_workers
    world, rank = accelerator.num_processes, accelerator.process_index
    plan = ShardPlan(split.stream.num_shards, world, max(1, workers), args.seed, by_rows=split.unsplittable)
    if not quiet:
        accelerator.print(f"data: {plan.describe(num_rows)}")
    classes = num_classes(objective.model.config)
    settings = ReaderSettings(args.batch_size, args.shuffle_window, args.interleave, args.views, classes, args.seed)
    transform = ImageTransform(image_processor, args.augmentation)
    loader = StreamLoader(split, plan, rank, transform, settings, in_process=workers == 0)
    layout = {"processes": world, "readers": plan.busy_workers, "shards": plan.num_shards}
    layout |= {"cached": args.cache_features, "batch_size": args.batch_size, "precision": accelerator.mixed_precision}
    layout |= {"masks": [*args.mask_kinds, *args.mask_backgrounds]} if args.objective == "mass_fidelity" else {}
    return Data(loader, layout, num_rows)


def cache_features(args: TrainingArguments, session: Session, objective: Objective, data: Data) -> Data:
    """The frozen backbone's features of the training images, computed once, in the images' place."""
    accelerator = session.accelerator
    cache = FeatureCache(session.folder.features, args.views, data.num_images, args.cache_limit_gib * 2**30)
    cache.prepare(accelerator, data.layout)
    cache.build(accelerator, objective, data.loader, session.interruption, session.bad_images)
    loader = cache.open(accelerator, args.batch_size, args.seed, session.bad_images)
    return Data(loader, data.layout, len(loader))


def optimize(
    args: TrainingArguments,
    session: Session,
    objective: Objective,
    trained: dict[str, torch.nn.Parameter],
    data: Data,
    pictured: list[torch.Tensor],
) -> Progress:
    """Take the optimiser steps that are left, and leave the trained weights in the objective's model.

    Raises:
        ValueError: where the run diverges.
        InterruptedRun: when told to stop; a checkpoint is saved.
    """
    model, accelerator = objective.model, session.accelerator
    changing = trained if args.freeze_backbone else model.state_dict(keep_vars=True)
    check_weights = WeightCheck(changing)
    update = make_update(args, accelerator, objective, trained)
    state = {"weights": changing, "averages": update.average.averages, "optimizer": update.optimizer}
    checkpoints = Checkpointer(accelerator, session.folder.checkpoints, args.keep_checkpoints, data.layout, **state)
    progress, place = checkpoints.resume()
    end = {"epochs": args.epochs, "max_steps": args.max_steps, "num_images": args.epochs * data.num_images}
    steps = Steps(accelerator, data.loader, progress, place, session.interruption, session.bad_images, **end)
    accelerator.init_trackers("logs", {name: str(value) for name, value in asdict(args).items()})
    names = model.config.stream_layers, model.config.evidence_queries or []
    logger = MetricLogger(accelerator, *names, args.log_steps, steps.num_images, progress.images)
    for step in steps:
        sums, rate = update(step)
        logger.log(progress, sums, step.images, rate)
        if args.saliency_steps and step.number % args.saliency_steps == 0 and pictured:
            logger.log_saliency(step.number, objective, pictured[0])
        if step.number % args.checkpoint_steps == 0:
            check_weights(step.number)
            checkpoints.save(progress, steps.place)
    logger.close()
    check_weights(progress.step)
    if steps.stopped:
        checkpoints.save(progress, steps.place)
        raise InterruptedRun(f"stopped after step {progress.step}: the same command goes on from there")
    update.finish()
    return progress


def make_update(
    args: TrainingArguments, accelerator: Accelerator, objective: Objective, trained: dict[str, torch.nn.Parameter]
) -> Update:
    """What one optimiser step does, by the settings."""
    optimizer = make_optimizer(objective, args.optimizer, args.learning_rate, args.weight_decay, args.query_rate)
    schedule = Schedule(args.schedule, args.learning_rate, args.warmup)
    num_labels, rank = objective.model.config.num_labels, accelerator.process_index
    mixer = Mixer(args.mixup, args.cutmix, num_labels, args.seed, rank)
    average = WeightAverage(trained, args.ema_decay)
    return Update(accelerator, objective, optimizer, schedule, mixer, average, args.max_grad_norm)


def make_optimizer(
    model, kind: str, learning_rate: float, weight_decay: float, query_rate: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum; weight decay for matrices, none for biases, norms and queries; the stream's query
    learns at `query_rate` times the rate."""
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=["*stream.query"])
    queries = [one for name, one in model.named_parameters() if name.endswith("stream.query") and one.requires_grad]
    if queries and query_rate != 1:
        known = {id(one) for one in queries}
        groups = [group | {"params": [one for one in group["params"] if id(one) not in known]} for group in groups]
        groups.append({"params": queries, "weight_decay": 0.0, "lr_scale": query_rate})
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def describe(args: TrainingArguments, folder: RunFolder) -> None:
    """Write the model card, if there is none yet."""
    if (folder.model / "README.md").is_file():
        return
    results = folder.evaluation / "results.json"
    hub_id = args.model if "/" in args.model and not os.path.exists(args.model) else None
    write_model_card(
        folder.model,
        read_json(results) if results.is_file() else None,
        asdict(args) | {"output_dir": None},
        repo_id=args.hub_model_id,
        base_model=f"timm/{args.model.removeprefix('timm:')}" if args.model.startswith("timm:") else hub_id,
        datasets=[args.dataset_name] if args.dataset_name and not os.path.exists(args.dataset_name) else None,
    )


def push(folder: RunFolder, repo_id: str) -> None:
    """Publish the model with its evaluation.

    Raises:
        OSError: where the Hub, or the way to it, fails.
    """
    evaluated = folder.evaluation if folder.evaluation.is_dir() else None
    try:
        print(f"pushed: {publish(folder.model, repo_id, results_dir=evaluated).url}")
    except PublishError as error:
        raise OSError(f"not pushed: {error} The model is complete in {folder.model}.") from error


def print_end(folder: RunFolder, seconds: float) -> None:
    """Where things are, and how to load the model."""
    facts = read_json(folder.model / TRAINING_FILE)
    if facts["entropy_after"]:
        print("attention entropy on held-out images, relative to uniform (1), before and after training:")
    for name, before, after in zip(facts["layers"], facts["entropy_before"], facts["entropy_after"], strict=False):
        print(f"  {name:12} {before:.4f} -> {after:.4f}")
    print(f"\ndone in {seconds / 60:.1f} minutes")
    for name in ("model", "evaluation", "logs"):
        if (path := folder.path / name).exists():
            print(f"  {name:12} {path}")
    print(f"""
from transformers import AutoImageProcessor, AutoModelForImageClassification
image_processor = AutoImageProcessor.from_pretrained("{folder.model}")
model = AutoModelForImageClassification.from_pretrained("{folder.model}", trust_remote_code=True)""")
