"""Run an evaluation: every image once, on any number of processes, in one go or in several."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from castream.artifacts.models import fingerprint_model
from tqdm import tqdm

from modeling_castream.backbone_castream import num_input_channels
from modeling_castream.features_castream import evaluating

from .block import evaluate_block
from .controls import confidences, fit_temperature
from .data import Block, Examples, Preprocessor, prepare_block, read_blocks, read_examples
from .figures import WRONG
from .precision import choose_autocast, correlations
from .published import published_rows
from .report import Report
from .scorer import Scorer
from .settings import EvaluationSettings
from .store import Part, SavedPart, Store, fingerprint_processor
from .summary import summarize

SECONDS_PER_PART = 30
MAX_SKIPPED_SHARE = 0.01
COMPARED_IMAGES = 4  # in both precisions; a table has dozens of values for each of them
MIN_SEEN = 100  # images before the share of skipped ones means anything, where the total is unknown


def evaluate_saliency(
    model: torch.nn.Module,
    image_processor,
    examples: Iterable[dict],
    settings: EvaluationSettings | None = None,
    output_dir: str | None = None,
    accelerator: Accelerator | None = None,
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    command: str | None = None,
) -> Report:
    """Evaluate a model's saliency maps. The model's mode, gradients and device are left as they were.

    Args:
        model: a CAStreamForImageClassification.
        image_processor: the model's, with a normalisation of one scale and offset a channel.
        examples: rows {"id": str, "image": PIL image, "label": class id, list of ids or None, "mask": image, array or
            None, "boxes": [[x0, y0, x1, y1], ...] in pixels of the upright image, where there is no mask, or None}; a
            `datasets` dataset, streaming or not, or any iterable. Only `image` is needed. Every process must see the
            same rows in the same order; each evaluates its share.
        settings: what to evaluate.
        output_dir: where to write the report. A killed run with the same model, examples and settings goes on there.
        accelerator: an `accelerate.Accelerator`; None makes one.
        model_name, dataset_name: for the report; None takes what the model was loaded from, and what the examples say.
        command: for the report: the command line of this evaluation, if it had one.

    Returns:
        The report, the same on all processes.

    Raises:
        ValueError: on input that cannot be evaluated, naming it: more than 1 % of the images undecodable, a class id
            out of range, NaN logits, no images, or an output folder of another evaluation or an earlier dataset.
    """
    settings = settings or EvaluationSettings()
    accelerator = accelerator or Accelerator()
    model = accelerator.unwrap_model(model)
    if model.config.problem_type == "regression":
        raise ValueError("the model is a regression (problem_type): it has no class whose probability could change.")
    examples = read_examples(examples, dataset_name, model.config.id2label)
    _check_columns(examples, settings)
    store = _open_store(output_dir, settings, model, image_processor, examples, accelerator)
    try:
        preprocessor = Preprocessor(image_processor, num_input_channels(model.config))
        run = _Run(model, preprocessor, examples, settings, accelerator, store)
        with _on(accelerator.device, model):
            report = run.report(model_name or model.config.name_or_path or type(model).__name__, command)
    except ValueError:  # of what cannot be evaluated: what can shall find the folder free
        if store is not None and accelerator.is_main_process:
            store.release()
        raise
    run.write(report)
    return report


@contextmanager
def _on(device: torch.device, model: torch.nn.Module) -> Iterator[None]:
    """A model on a device; afterwards it is again where it was."""
    before = model.device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


def _check_columns(examples: Examples, settings: EvaluationSettings) -> None:
    wanted = settings.localization_metrics
    if wanted and examples.columns and not {"mask", "boxes"} & set(examples.columns):
        raise ValueError(
            f"{examples.name} has no mask column, which {', '.join(wanted)} need, nor one of boxes: name it as "
            "mask_column or boxes_column."
        )


def _open_store(output_dir, settings, model, image_processor, examples: Examples, accelerator) -> Store | None:
    if output_dir is None:
        return None
    identity = settings.to_dict() | {
        "dataset": examples.name,
        "columns": examples.columns,
        "dataset_files": examples.fingerprint,
        "image_processor": fingerprint_processor(image_processor),
        "weights": fingerprint_model(model),
    }
    store = Store(output_dir, identity)
    if accelerator.is_main_process:
        store.claim()
    accelerator.wait_for_everyone()
    store.claim()  # the others check what the first one wrote
    return store


class _Run:
    """One process's share of an evaluation."""

    def __init__(self, model, preprocessor, examples: Examples, settings, accelerator, store: Store | None):
        self.model, self.preprocessor, self.examples = model, preprocessor, examples
        self.settings, self.accelerator, self.store = settings, accelerator, store
        finished = store.parts() if store is not None else []
        self.done = {number for part in finished for number in part.blocks}
        self.known = set(_indices(finished))
        self.read = 0  # rows of the dataset, of all processes
        self.precision = {}
        self.kept = {}  # examples for the picture, where there is no folder
        accelerator.wait_for_everyone()  # nobody writes a part before all have read the same ones

    def report(self, model_name: str, command: str | None) -> Report:
        """Evaluate what is missing, gather, and summarise."""
        self.precision = self._choose_precision()
        temperature = self._temperature() if "temperature" in self.settings.controls else None
        scorer = self._scorer(temperature)
        part = self._gather(self._evaluate(scorer))
        context = {
            "model": model_name,
            "dataset": self.examples.name,
            "command": command,
            "device": self.accelerator.device.type,
            "image_processor": self.preprocessor.describe(),
            "note": self._note(),
            "temperature": temperature,
            "precision": gather_object([self.precision])[0],  # the main process compares
        }
        results = summarize(self.settings, part, context)
        return Report(
            self.settings, part, results, self._examples(), published_rows(self.model.config, self.examples.name)
        )

    def _gather(self, parts: list[Part]) -> Part | SavedPart:
        """The table of all processes, whose images were all counted once; on disk where there is a folder."""
        if self.store is None:
            gathered = gather_object([Part.merge(parts)])
            self._check(gathered)
            return Part.merge(gathered)
        self.accelerator.wait_for_everyone()
        self._check(self.store.parts())
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.store.merge()
        self.accelerator.wait_for_everyone()
        return self.store.read()

    def write(self, report: Report) -> None:
        """Write the report, then remove the parts it was made of; by one process, while the others wait."""
        if self.store is None:
            return
        if self.accelerator.is_main_process:
            report.write(self.store.folder)
            self.store.finish()
        self.accelerator.wait_for_everyone()

    def _choose_precision(self) -> dict:
        """The precision that the main process chose, now or in an earlier run, and what it found out about it."""
        found = self.store.read_value("precision") if self.store is not None else None
        if found is None and self.accelerator.is_main_process:
            found = {"autocast": choose_autocast(self.settings, self.model)}
            if self.store is not None:
                self.store.write_value("precision", found)
        return gather_object([found])[0]

    def _scorer(self, temperature: float | None, autocast: str | None = None) -> Scorer:
        settings = replace(self.settings, autocast=autocast or self.precision["autocast"])
        return Scorer(self.model, settings, self.preprocessor.mean, self.preprocessor.std, temperature)

    def _blocks(self, description: str, done: set[int]) -> Iterator[Block]:
        """This process's blocks that are not done, prepared, with a progress bar over all images."""
        settings, accelerator = self.settings, self.accelerator
        totals = [n for n in (self.examples.total, settings.max_images) if n is not None]
        total = min(totals) if self.examples.total is not None else settings.max_images
        done_images = len(done) * settings.block_size
        bar = tqdm(
            total=total,
            initial=min(done_images, total or done_images),
            desc=description,
            unit=" images",
            disable=not accelerator.is_main_process,
        )
        seen, skipped, waiting, self.read = 0, [], 0, 0
        with bar:
            for number, rows in read_blocks(self.examples, settings.block_size, settings.max_images):
                self.read += len(rows)
                self._check_known(rows if number in done else [])
                waiting += len(rows) if number not in done else 0
                if number % accelerator.num_processes != accelerator.process_index or number in done:
                    continue
                block = self._prepare(number, rows)
                seen, skipped = seen + len(rows), skipped + block.skipped
                self._check_skipped(skipped, total or (seen if seen >= MIN_SEEN else None))
                yield block
                bar.update(waiting)
                waiting = 0
            bar.update(waiting)

    def _prepare(self, number: int, rows: list[dict]) -> Block:
        wants_objects = bool(self.settings.localization_metrics)
        return prepare_block(number, rows, self.preprocessor, self.model.config.num_labels, read_boxes=wants_objects)

    def _note(self) -> str:
        columns = self.examples.columns
        boxes = self.settings.localization_metrics and "boxes" in columns and "mask" not in columns
        return f"{self.examples.note} Objects are given by their boxes.".strip() if boxes else self.examples.note

    def _check_known(self, rows: list[dict]) -> None:
        """Blocks of an earlier run must hold the images that they hold now."""
        if any(row["index"] not in self.known for row in rows):
            raise ValueError(f"{self.examples.name} has grown since this output_dir was begun: choose another folder.")

    def _check_skipped(self, skipped: list[dict], total: int | None) -> None:
        """Stop once more images could not be decoded than may be left out."""
        if total and len(skipped) > MAX_SKIPPED_SHARE * total:
            raise ValueError(
                f"{len(skipped)} of {total} images cannot be decoded, such as {skipped[-1]['id']} "
                f"({skipped[-1]['reason']}): more than 1 % would bias the result, repair the dataset."
            )

    def _evaluate(self, scorer: Scorer) -> list[Part]:
        """Evaluate this process's missing blocks; with a folder a part goes there every half a minute, and none stays
        in memory."""
        parts, last = [], time.monotonic()
        for block in self._blocks("evaluating", self.done):
            parts.append(self._evaluate_block(scorer, block))
            if self.store is not None and time.monotonic() - last > SECONDS_PER_PART:
                self.store.write_part(Part.merge(parts))
                parts, last = [], time.monotonic()
        if self.store is not None and parts:
            self.store.write_part(Part.merge(parts))
        return parts

    def _evaluate_block(self, scorer: Scorer, block: Block) -> Part:
        if not block.ids:
            return Part.of_block(block.number, [], block.skipped)
        with _naming(block):
            rows, maps = evaluate_block(scorer, block)
            if block.number == 0 and scorer.settings.autocast != "off":  # the main process's
                compared = block.first(COMPARED_IMAGES)
                exact, _ = evaluate_block(self._scorer(scorer.temperature, "off"), compared)
                self._note_precision([row for row in rows if row["index"] in compared.indices], exact)
        self._keep_examples(block, rows, maps)
        return Part.of_block(block.number, rows, block.skipped)

    def _note_precision(self, rows: list[dict], exact: list[dict]) -> None:
        """Note how rows go with those of the same images in float32."""
        found = correlations(rows, exact, self.settings.metrics)
        self.precision |= {"images": len({row["index"] for row in rows}), "correlation": found}
        if self.store is not None:
            self.store.write_value("precision", self.precision)

    def _picks(self) -> set[int]:
        """Which images the picture shows: spread over the dataset where its size is known, else the first ones."""
        wanted, total = self.settings.num_examples, self.examples.total
        if total is None:
            return set(range(wanted))
        total = min(total, self.settings.max_images or total)
        return {place * total // wanted for place in range(wanted)} if total > wanted else set(range(total))

    def _keep_examples(self, block: Block, rows: list[dict], maps: dict) -> None:
        picks = self._picks()
        for place, index in enumerate(block.indices):
            if index not in picks:
                continue
            arrays = {
                f"{method}|{pooling}": saliency[place].numpy()
                for (method, pooling, matched), saliency in maps.items()
                if not matched
            }
            arrays["image"] = _to_rgb(block.images[place])
            arrays["title"] = np.array(self._title(index, rows))
            if block.masks[place] is not None:
                arrays["mask"] = block.masks[place].numpy()
            if self.store is not None:
                self.store.write_example(index, arrays)
            else:
                self.kept[index] = arrays

    def _title(self, index: int, rows: list[dict]) -> str:
        """The explained class and each pooling's probability of it."""
        mine = [row for row in rows if row["index"] == index and row["control"] == ""]
        lines = [_shorten(str(self.model.config.id2label.get(mine[0]["target"], mine[0]["target"])))]
        for pooling in self.settings.poolings:
            row = next(row for row in mine if row["pooling"] == pooling)
            mark = f" {WRONG}" if row["correct"] is False else ""
            lines.append(f"{pooling.upper()} {100 * row['probability']:.0f} %{mark}")
        return "\n".join(lines)

    def _examples(self) -> dict[int, dict[str, np.ndarray]]:
        if self.store is not None:
            self.accelerator.wait_for_everyone()
            return self.store.read_examples()
        gathered = gather_object([self.kept])
        return {index: arrays for kept in gathered for index, arrays in kept.items()}

    def _check(self, parts: list[Part] | list[SavedPart]) -> None:
        """Every image once, and not too many left out."""
        indices = _indices(parts)
        if self.read < len(indices) and self.done:
            raise ValueError(f"{self.examples.name} has shrunk since this output_dir was begun: choose another folder.")
        blocks = [number for part in parts for number in part.blocks]
        if len(blocks) != len(set(blocks)) or sorted(indices) != list(range(self.read)):
            raise RuntimeError(f"images were not counted exactly once: {len(indices)} of {self.read} were.")
        if not indices:
            raise ValueError(f"examples of {self.examples.name} holds no image: check the split.")
        self._check_skipped([entry for part in parts for entry in part.skipped], len(indices))

    def _temperature(self) -> float:
        """The temperature at which GAP's mean confidence is CA's, from one more pass over the images."""
        found = self.store.read_value("temperature") if self.store is not None else None
        if found is not None:
            return found
        if self.examples.rows is iter(self.examples.rows):
            raise ValueError("control 'temperature' reads the examples twice: give a dataset, not an iterator.")
        scorer = self._scorer(temperature=1.0)
        logits, confidence = [], []
        for block in self._blocks("fitting the temperature", set()):
            if block.ids:
                with _naming(block), evaluating(self.model):
                    features = scorer.features(block.pixel_values.to(self.model.device))
                    confidence.append(confidences(scorer.probabilities(features)["ca"], scorer.independent).cpu())
                    logits.append(scorer.logits(features)[self.settings.own_pooling].cpu())
        found = (torch.cat(parts) if parts else None for parts in (logits, confidence))
        temperature = self._fit(*found, scorer.independent)
        if self.store is not None and self.accelerator.is_main_process:
            self.store.write_value("temperature", temperature)
        return temperature

    def _fit(self, logits: torch.Tensor | None, confidence: torch.Tensor | None, independent: bool) -> float:
        def mean_over_all(values: torch.Tensor | None) -> float:
            mine = (0.0, 0) if values is None else (float(values.double().sum()), len(values))
            sums = gather_object([mine])
            count = sum(number for _, number in sums)
            if not count:
                raise ValueError(f"examples of {self.examples.name} holds no image: check the split.")
            return sum(total for total, _ in sums) / count

        def at_temperature(temperature: float) -> float:
            if logits is None:
                return mean_over_all(None)
            return mean_over_all(confidences(self.model.probabilities(logits / temperature), independent))

        return fit_temperature(at_temperature, mean_over_all(confidence))


def _indices(parts: list[Part] | list[SavedPart]) -> list[int]:
    """Images that parts hold or have skipped."""
    return [
        index for part in parts for index in (*part.indices().tolist(), *(entry["index"] for entry in part.skipped))
    ]


@contextmanager
def _naming(block: Block) -> Iterator[None]:
    """Let an error say which images it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"images {block.ids[0]} to {block.ids[-1]}: {error}") from None


def _to_rgb(image: torch.Tensor) -> np.ndarray:
    """An image (num_channels, height, width) in [0, 1] as it is shown, uint8 (height, width, 3)."""
    channels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)  # without opacity; grey
    return (255 * channels).round().byte().permute(1, 2, 0).numpy()


def _shorten(label: str, width: int = 18) -> str:
    label = label.split(",")[0]
    return label if len(label) <= width else label[: width - 1] + "…"
