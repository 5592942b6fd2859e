"""Train the attention stream of a CA-Stream model.

    accelerate launch train.py                                          the demo, on embedded scenes
    accelerate launch train.py --config recipes/imagenet_resnet50.yaml  a recipe; any line of it can be overridden:
    accelerate launch train.py --config recipes/photos_distill.yaml --dataset_name ~/photos --output_dir outputs/photos

A run that was killed goes on when the same command is given again. Exit code 0: done; 2: bad input, in one line;
75: told to stop (SIGTERM, SIGINT), with everything saved.
"""

import os
import sys
import time
from dataclasses import asdict, replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from castream.artifacts.files import read_json, write_json
from castream.data.opening import Split, open_split
from castream.data.transforms import ImageTransform
from castream.evaluation import EvaluationSettings, evaluate_saliency
from castream.publishing import PublishError, publish, write_model_card
from castream.training.arguments import TrainingArguments, parse_arguments
from castream.training.average_precision import score_held_out
from castream.training.ema import Ema
from castream.training.heldout import HeldOut, measure_entropy
from castream.training.interruption import EXIT_INTERRUPTED, InterruptedRun, Interruption
from castream.training.mixing import Mixer
from castream.training.model import TRAINING_FILE, find_model, freeze, load_model, parameter_groups, save_model
from castream.training.objectives import Objective
from castream.training.preparation import (
    cache_features,
    check_end,
    default_threads,
    fit_classifier,
    make_loader,
    match_labels,
    watched_images,
)
from castream.training.progress import Keeper
from castream.training.run_folder import RunFolder
from castream.training.schedules import learning_rate, run_progress
from castream.training.steps import backward, spare_batch, take, to_device, total
from castream.training.watching import Watch, check_bad_images, check_loss, check_weights, note_bad_images
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from modeling_castream import CAStreamForImageClassification

EXIT_BAD_INPUT = 2
ENTROPY_IMAGES = 128  # held-out images on which the attention's entropy is reported


def main(args: TrainingArguments) -> None:
    started = time.time()
    interruption = Interruption()
    disable_progress_bar()  # transformers shows one for every file of weights
    accelerator = start_accelerator(args)
    settings = check_end(args, accelerator)
    folder = RunFolder(args, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    folder.check_shared()
    set_seed(args.seed)

    # The dataset
    split = open_split(args, args.train_split)
    held_out = None
    if args.validation_split:
        held_out = HeldOut(open_split(args, args.validation_split), args.validation_split)

    # The model
    model, image_processor, unfitted = find_model(args, folder, split)
    split = match_labels(args, accelerator, split, held_out, model.config, unfitted)
    if folder.model.is_dir():
        accelerator.print(f"training is complete: {folder.model}")
    else:
        train(args, accelerator, folder, model, image_processor, unfitted, split, held_out, interruption)
        model, image_processor = load_model(folder.model)  # what is evaluated is what was saved, on every process

    # What it is worth
    if held_out and not (folder.evaluation / "results.json").is_file():
        evaluate(args, accelerator, folder, model, image_processor, held_out, settings)
    if accelerator.is_main_process:
        describe(args, folder)
        folder.release()
        push(args, folder)
        print_end(folder, time.time() - started)
    accelerator.end_training()


def start_accelerator(args: TrainingArguments) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.tracker == "none" else args.tracker,
        project_dir=args.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(args.cpu_threads or default_threads())
    return accelerator


def train(
    args: TrainingArguments,
    accelerator: Accelerator,
    folder: RunFolder,
    model: CAStreamForImageClassification,
    image_processor,
    unfitted: bool,
    split: Split,
    held_out: HeldOut | None,
    interruption: Interruption,
) -> None:
    """Train a model from wherever the folder's run stands, and save it."""
    # What learns
    weights = freeze(model, args)
    model.castream.backbone.to(memory_format=torch.channels_last)
    if args.compile_backbone:
        model.castream.backbone.compile()
    objective = Objective(model, args, image_processor.image_mean, image_processor.image_std).to(accelerator.device)

    # Who reads what; a frozen backbone's part of it only once, if the settings say so
    loader, layout, num_rows = make_loader(args, accelerator, split, image_processor, model.config.num_labels)
    if args.cache_features:
        loader = cache_features(args, accelerator, folder, objective, loader, layout, num_rows, interruption)
        num_rows = len(loader)
    if unfitted:
        fit_classifier(args, accelerator, folder, objective, loader, image_processor)
    watched = watched_images(accelerator, objective, held_out, image_processor, ENTROPY_IMAGES)
    entropy_before = measure_entropy(model, watched)

    # Optimiser, and all that a resumed run restores
    groups = parameter_groups(weights, args.weight_decay)
    optimizer = (
        torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum)
        if args.optimizer == "sgd"
        else torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    )
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    ema = Ema(weights, args.ema_decay) if args.ema_decay else None
    moving = weights if args.freeze_backbone else model.state_dict(keep_vars=True)
    keeper = Keeper(args, accelerator, folder, moving, optimizer, ema, layout)
    progress, place = keeper.resume()
    accelerator.init_trackers("logs", {name: str(value) for name, value in asdict(args).items()})
    images_in_all = args.epochs * num_rows
    watch = Watch(args, accelerator, model.config.stream_layers, images_in_all, progress)
    rate = 0.0
    mixer = Mixer(args, model.config.num_labels, accelerator.process_index)

    # The loop: a step is over when all processes are; an epoch, when all have run out
    spare, interruption.deferred = None, True
    while not is_complete(args, progress):
        batches = loader.epoch(progress.epoch, place)
        while not is_complete(args, progress):
            taken, after = take(batches, args.gradient_accumulation_steps)
            place, spare = after or place, taken[-1] if taken else spare or spare_batch(loader, progress.epoch)
            counts = [sum(len(batch["keys"]) for batch in taken), loader.rows, len(loader.bad), interruption.requested]
            images, rows, bad, stop = (int(count) for count in total(accelerator, counts))
            progress.rows, loader.rows = progress.rows + rows, 0
            if bad:
                note_bad_images(args, accelerator, folder, progress, loader)
            if not images:
                check_bad_images(args, folder, progress.bad, progress.rows)
                break
            rate = learning_rate(args, run_progress(args, progress, images, images_in_all))
            for group in optimizer.param_groups:
                group["lr"] = rate
            taken = [mixer(batch, progress.step, part) for part, batch in enumerate(taken)]
            taken, spare = to_device(taken, accelerator.device), to_device(spare, accelerator.device)
            sums = backward(accelerator, prepared, taken, spare, images)
            check_loss(sums, progress, rate, taken)
            if args.max_grad_norm:
                accelerator.clip_grad_norm_(weights.values(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            progress.step, progress.images = progress.step + 1, progress.images + images
            if ema:
                ema.update(progress.step)
            watch.step(progress, sums, images, rate)
            watch.strip(progress, objective, watched)
            if stop or progress.step % args.checkpoint_steps == 0:
                check_weights(moving, progress, rate)
                keeper.save(progress, place)
            if stop:
                raise InterruptedRun(f"stopped after step {progress.step}: the same command goes on from there")
        else:
            break
        progress.epoch, place = progress.epoch + 1, None
    watch.close()

    # The trained model
    check_weights(moving, progress, rate)
    if ema:
        ema.apply()
    model.eval()
    if accelerator.is_main_process:
        facts = {"entropy_before": entropy_before, "entropy_after": measure_entropy(model, watched)}
        facts |= {"layers": model.config.stream_layers, "progress": asdict(progress), "entropy_images": ENTROPY_IMAGES}
        save_model(folder.model, model, image_processor, facts)
    accelerator.wait_for_everyone()
    interruption.settle()


def is_complete(args: TrainingArguments, progress) -> bool:
    return progress.epoch >= args.epochs or bool(args.max_steps and progress.step >= args.max_steps)


def evaluate(
    args, accelerator, folder, model, image_processor, held_out: HeldOut, settings: EvaluationSettings
) -> None:
    """GAP and CA side by side on held-out images."""
    if held_out.split.multi_label:
        objective = Objective(model, args, image_processor.image_mean, image_processor.image_std).to(accelerator.device)
        transform = ImageTransform(image_processor, "none")
        scores = score_held_out(accelerator, objective, held_out, transform, args.batch_size)
        accelerator.print("mean average precision: GAP {gap:.2f}, CA {ca:.2f}, on {images} images".format(**scores))
        if accelerator.is_main_process:
            write_json(folder.path / "mean_average_precision.json", scores)
    masks = ("mask_share", "pointing_game") if held_out.has_masks else ()
    settings = replace(settings, metrics=tuple(dict.fromkeys((*settings.metrics, *masks))))
    report = evaluate_saliency(
        model.eval(),
        image_processor,
        held_out,
        settings,
        str(folder.evaluation),
        accelerator,
        model_name=args.model,
        dataset_name=f"{args.dataset_name or 'scenes'}/{args.validation_split}",
    )
    accelerator.print("\n" + report.markdown())


def describe(args: TrainingArguments, folder: RunFolder) -> None:
    """Write the model card."""
    if not (folder.model / "README.md").is_file():
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


def push(args: TrainingArguments, folder: RunFolder) -> None:
    """Push the model, if the settings say so.

    Raises:
        OSError: where the Hub, or the way to it, fails.
    """
    if args.push_to_hub:
        evaluated = folder.evaluation if folder.evaluation.is_dir() else None
        try:
            print(f"pushed: {publish(folder.model, args.hub_model_id, results_dir=evaluated).url}")
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


def run() -> int:
    """Run, with what a user can mend reported in one line."""
    try:
        main(parse_arguments())
    except InterruptedRun as stopped:
        tqdm.write(f"train.py: {stopped}", file=sys.stderr)  # on a line of its own, whatever bar was being drawn
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        if os.environ.get("CASTREAM_TRACEBACK"):
            raise
        tqdm.write(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(run())
