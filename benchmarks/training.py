"""How near training comes to the frozen network's own speed, in one run.

    python -m benchmarks.training [--networks MobileNetV3-Small ResNet-50] [--threads 1] [--device cuda]

Images a second of
  a  the plain frozen forward pass on data in memory,
  b  the training step (backbone, stream, loss, backward pass, optimiser) on data in memory,
  c  the same from streamed JPEG shards, as train.py reads them,
  d  the same through the loading path of transformers' run_image_classification_no_trainer.py: PIL and torchvision's
     transforms in `with_transform` of a `datasets` dataset, a DataLoader without workers,
  e  d with as many workers as c,
and what c's decoding reaches alone. All take their turn in every round; figures are medians over rounds, and ratios the
medians of the rounds' own ratios: by the clock, and by the processor time of the training process, which a busy machine
disturbs less and which leaves out the workers'. Memory is the peak of a process of its own, network and batch included.
"""

import argparse
import gc
import io
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from castream.data.loader import ReaderSettings, StreamLoader
from castream.data.opening import open_split
from castream.data.sharding import ShardPlan
from castream.data.transforms import ImageTransform
from castream.training.loop import to_device
from castream.training.model import unfreeze
from castream.training.objective import Objective
from castream.training.run import make_optimizer
from datasets import ClassLabel, Features, Image, load_dataset
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from torchvision import transforms
from transformers import BitImageProcessor, TimmBackboneConfig

from benchmarks import networks
from benchmarks.memory import forget_peak, hardware, peak, resident, wait
from benchmarks.networks import SAMPLE
from modeling_castream import CAStreamConfig, CAStreamForImageClassification

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DISTINCT = 800  # JPEGs that are encoded
FEATURES = Features({"image": Image(), "label": ClassLabel(num_classes=1000)})
NAMES = {
    "a": "frozen forward pass, in memory",
    "b": "training step, in memory",
    "c": "training, streamed JPEG",
    "decode": "decoding alone, streamed JPEG",
    "d": "training, no-trainer loading",
    "e": "training, no-trainer loading with workers",
}


def mobilenet() -> CAStreamForImageClassification:
    """MobileNetV3-Small with random weights: so light that reading binds."""
    torch.manual_seed(0)
    backbone = TimmBackboneConfig(backbone="mobilenetv3_small_100", out_indices=[0, 1, 2, 3, 4])
    return CAStreamForImageClassification(CAStreamConfig(backbone_config=backbone, num_labels=1000, init="reference"))


NETWORKS = {"MobileNetV3-Small": mobilenet, **networks.NETWORKS}


PROCESSOR = BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=2)


def write_jpegs(folder: Path, count: int, shards: int) -> None:
    """Parquet shards of JPEGs of ImageNet's usual size, 500 x 375: photos if there are any, else smooth noise.

    Of a large number every few hundredth is the same.
    """
    photos = sorted(Path(SAMPLE).rglob("*.jpg"))
    rng = np.random.default_rng(0)
    encoded = []
    for index in range(min(count, DISTINCT)):
        if photos:
            picture = PILImage.open(photos[index % len(photos)]).convert("RGB").resize((500, 375), PILImage.BICUBIC)
        else:
            coarse = PILImage.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
            pixels = np.asarray(coarse, np.int16) + rng.integers(-20, 20, (375, 500, 3))
            picture = PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=92)
        encoded.append(buffer.getvalue())
    print(f"JPEGs of {sum(map(len, encoded)) / len(encoded) / 1000:.0f} kB on average")
    for shard in range(shards):
        numbers = range(shard, count, shards)
        rows = [{"image": {"bytes": encoded[n % len(encoded)], "path": None}, "label": n % 1000} for n in numbers]
        table = pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema)
        pq.write_table(table, folder / f"train-{shard:05d}.parquet", row_group_size=64)


class Step:
    """A network, its objective and its optimiser."""

    def __init__(self, network: str, precision: str, batch_size: int, device: str):
        self.device, self.model = device, NETWORKS[network]().to(device)
        self.model.config.freeze_classifier = True
        unfreeze(self.model, train_stream=True, train_evidence=False, freeze_output_projection=False)
        self.model.castream.backbone.to(memory_format=torch.channels_last)
        self.objective = Objective(self.model, MEAN, STD).to(device)
        self.optimizer = make_optimizer(self.model, "adamw", 1e-4, 1e-2)
        self.autocast = lambda: torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8, generator=generator)
        self.images = images.contiguous(memory_format=torch.channels_last).to(device)  # as the workers deliver them
        self.labels = torch.randint(0, 1000, (batch_size,), generator=generator).to(device)
        self.pixel_values = self.objective.normalize(self.images)

    def forward(self) -> int:
        with torch.no_grad(), self.autocast():
            self.model(self.pixel_values, pooling="gap")
        return len(self.pixel_values)

    def train(self, batch: dict | None = None) -> int:
        batch = to_device(batch, self.device) if batch else {"images": self.images, "labels": self.labels}
        with self.autocast():
            loss = self.objective(batch)["loss"] / len(batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return len(batch["labels"])

    def train_normalized(self, batch: dict) -> int:
        """A step on pixels that the loading path has normalised."""
        with self.autocast():
            features = {"view": self.model.castream.extract_features(batch["pixel_values"].to(self.device))}
        return self.train({"features": features, "labels": batch["labels"]})


def streamed(folder: Path, batch_size: int, workers: int) -> Iterator[dict]:
    """Batches as train.py reads them, epoch after epoch."""
    split = open_split(str(folder), "train")
    plan = ShardPlan(split.stream.num_shards, 1, max(1, workers))
    settings = ReaderSettings(batch_size, 128, 4, None, 1000, 0)
    transform = ImageTransform(PROCESSOR, "crop")
    loader = StreamLoader(split, plan, 0, transform, settings, in_process=workers == 0)
    for epoch in itertools.count():
        for batch, _ in loader.epoch(epoch):
            yield batch


def no_trainer(folder: Path, batch_size: int, workers: int) -> Iterator[dict]:
    """Batches as transformers' example reads them, epoch after epoch."""
    steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])

    def preprocess(examples):
        examples["pixel_values"] = [transform(image.convert("RGB")) for image in examples["image"]]
        return examples

    def collate(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}

    files = sorted(str(path) for path in folder.glob("*.parquet"))
    dataset = load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    dataset = dataset.with_transform(preprocess)
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, collate_fn=collate, num_workers=workers)
    while True:
        yield from loader


def contenders(step: Step, folder: Path, batch_size: int, workers: int) -> dict[str, Callable[[], int]]:
    """Each does one batch and returns its number of images."""
    ours, decoded = streamed(folder, batch_size, workers), streamed(folder, batch_size, workers)
    theirs, helped = no_trainer(folder, batch_size, 0), no_trainer(folder, batch_size, workers)
    return {
        "a": step.forward,
        "b": step.train,
        "c": lambda: step.train(next(ours)),
        "decode": lambda: len(next(decoded)["keys"]),
        "d": lambda: step.train_normalized(next(theirs)),
        "e": lambda: step.train_normalized(next(helped)),
    }


def speeds(network: str, folder: Path, options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Images a second of every contender in every round: by the clock, and of the training process's processor time.

    Only one contender's workers may be busy at a time: each starts its own, works, and is stopped.
    """
    step = Step(network, options.precision, options.batch_size, options.device)
    found = {name: [] for name in options.contenders}
    for index in range(options.rounds):
        shift = index % len(found)
        for name in [*found][shift:] + [*found][:shift]:
            run = contenders(step, folder, options.batch_size, options.workers)[name]
            for _ in range(options.warm_up):  # a loader's queue is full before and after, so what is timed is steady
                run()
            wait(options.device)
            start, images = (time.perf_counter(), time.process_time()), 0
            for _ in range(options.batches):
                images += run()
            wait(options.device)
            found[name].append((images / (time.perf_counter() - start[0]), images / (time.process_time() - start[1])))
            del run
    return found


def peak_of(name: str, network: str, options: argparse.Namespace) -> int:
    """Run `a` or `b` twice; by how many MiB the network, the batch and that raised the peak memory.

    A first, small step is there for the libraries' own memory, and the forward pass has no optimiser.
    """
    warm = Step("MobileNetV3-Small", options.precision, 2, options.device)
    warm.train()
    del warm
    gc.collect()
    before = resident(options.device)
    step = Step(network, options.precision, options.batch_size, options.device)
    step.__dict__.pop("images" if name == "a" else "pixel_values")  # the other one's batch
    forget_peak(options.device)
    for _ in range(2):
        step.forward() if name == "a" else step.train()
    return round(peak(options.device) - before)


def measured_peak(name: str, network: str, options: argparse.Namespace) -> int:
    """`peak_of` in a fresh process that gives large blocks back as they are freed, MiB.

    By itself glibc keeps some of them, by an adaptive rule that makes peaks differ by a third from run to run. A GPU's
    memory needs no such care.
    """
    if options.device == "cuda":
        return peak_of(name, network, options)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training", "--threads", str(options.threads)]
    command += ["--batch-size", str(options.batch_size), "--precision", options.precision, "--peak-of", name, network]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(found.stdout.split()[-1])


def report(network: str, found: dict[str, list[tuple[float, float]]], options: argparse.Namespace) -> None:
    """Print the table of a network, and the ratios that are promised."""

    def ratio(first: str, second: str, clock: int) -> float:
        pairs = zip(found[first], found[second], strict=True)
        return statistics.median(one[clock] / other[clock] for one, other in pairs)

    peaks = {name: measured_peak(name, network, options) for name in "ab"}
    heads = ("", "images/s", "relative to a", "by processor time", "peak memory, MiB")
    print(f"\n{network}, {options.precision}\n\n| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for name, values in found.items():
        speed = statistics.median(value[0] for value in values)
        relative = "" if name == "decode" else f"{ratio(name, 'a', 1):.2f}"
        print(
            f"| {name}: {NAMES[name]} | {speed:.1f} | {ratio(name, 'a', 0):.2f} | {relative} | {peaks.get(name, '')} |"
        )
    pairs = [pair for pair in (("b", "a"), ("c", "b"), ("c", "d"), ("c", "e")) if set(pair) <= set(found)]
    for clock, words in enumerate(("by the clock", "by the training process's processor time")):
        print(f"\n{words}: " + ", ".join(f"{one}/{other} {ratio(one, other, clock):.2f}" for one, other in pairs))
    if {"b", "decode"} <= set(found):
        together = [1 / (1 / b[0] + 1 / d[0]) for b, d in zip(found["b"], found["decode"], strict=True)]
        print(f"decoding and training in turns on the same core: {statistics.median(together):.1f} images/s")
    print(f"peak memory b/a {peaks['b'] / peaks['a']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--contenders", nargs="+", choices=list(NAMES), default=list(NAMES), help="a must be one")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=6, help="timed per round and contender")
    parser.add_argument("--warm-up", type=int, default=3, help="batches before")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=800, help="JPEGs in the shards")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak-of", nargs=2, metavar=("CONTENDER", "NETWORK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(peak_of(*options.peak_of, options))
        return
    print(f"{hardware(options.device, options.threads)}, load {os.getloadavg()[0]:.1f} at the start")
    with tempfile.TemporaryDirectory() as scratch:
        write_jpegs(Path(scratch), options.images, shards=max(4, options.workers))
        for network in options.networks:
            report(network, speeds(network, Path(scratch), options), options)


if __name__ == "__main__":
    main()
