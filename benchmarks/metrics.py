"""Metrics of the evaluation beside Quantus's and torch-cam's, on the same network, photos and Grad-CAM maps.

    python -m benchmarks.metrics [--photos 16] [--rounds 3] [--threads 1]

Each is set up to compute what ours defines, as far as it lets itself; the contenders of a metric take turns.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from castream.evaluation.block import Items, score_curve_ends, score_map
from castream.evaluation.localization import mask_share, pointing_hit
from castream.evaluation.masking import num_steps, pixels_per_step
from castream.evaluation.metrics.average_drop.average_drop import average_drop
from castream.evaluation.metrics.average_increase.average_increase import average_increase
from castream.evaluation.scorer import Scorer
from castream.evaluation.settings import EvaluationSettings
from torch import nn

from benchmarks.networks import efficientnet_lite0, images, pooled_layer
from benchmarks.peers import Logits
from benchmarks.saliency import take_turns
from modeling_castream.features_castream import evaluating
from modeling_castream.saliency_castream import explain_features, extract, upsample_maps

MEAN = STD = [0.5, 0.5, 0.5]


class Probabilities(Logits):
    """What Quantus wants to be given: a module that returns probabilities."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return super().forward(pixel_values).softmax(-1)


class Explained(Logits):
    """Probabilities with the logits' gradient: torch-cam differentiates what it scores, and we the logits."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits = super().forward(pixel_values)
        return logits + (logits.softmax(-1) - logits).detach()


class Ours:
    """castream's evaluation of Grad-CAM under GAP, a metric at a time."""

    def __init__(self, model: nn.Module, pixel_values: torch.Tensor):
        self.model, self.pixel_values = model, pixel_values

    def _items(self, images: torch.Tensor, scorer: Scorer) -> tuple[Items, torch.Tensor]:
        features = extract(self.model, self.pixel_values)
        target = features.logits("gap").argmax(1)
        before, place = scorer.score_features(features, target), torch.arange(len(target))
        saliency = explain_features(features, target, "grad_cam", "gap")
        return Items(place, target, target, self.pixel_values, images, features, before), saliency

    def _scores(self, metrics: tuple[str, ...], images: torch.Tensor, mean: list[float], std: list[float]):
        settings = EvaluationSettings(("grad_cam",), ("gap",), metrics)
        scorer = Scorer(self.model, settings, mean, std)
        with evaluating(self.model):
            items, saliency = self._items(images, scorer)
            ends = score_curve_ends(scorer, items) if "deletion" in metrics else None
            return items.before.probability["gap"], score_map(scorer, items, saliency, ends)

    def deletion_curve(self) -> torch.Tensor:
        """(photos, points) after the whole image."""
        return self._scores(("deletion",), self.pixel_values, MEAN, STD)[1].curves["deletion"]["gap"][:, 1:]

    def drop_and_increase(self, normalized: bool = False) -> torch.Tensor:
        """Average drop and increase in percent; `normalized`: the map masks the network's input, not the image."""
        black = (self.pixel_values, [0.0] * 3, [1.0] * 3) if normalized else (self.pixel_values / 2 + 0.5, MEAN, STD)
        before, scores = self._scores(("average_drop", "average_increase"), *black)
        after = scores.masked.probability["gap"]
        return torch.tensor([average_drop(after, before), average_increase(after, before)])


def quantus_metric(name: str, model: nn.Module, inputs: dict[str, np.ndarray], **options) -> torch.Tensor:
    """A metric of Quantus's as its manual calls it: one row an image."""
    import quantus

    options |= {"abs": False, "normalise": False, "disable_warnings": True, "display_progressbar": False}
    scores = getattr(quantus, name)(**options)(model=model, device="cpu", softmax=False, batch_size=16, **inputs)
    return torch.tensor(np.array(scores, dtype=np.float32))


def torch_cam_metric(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """torch-cam's average drop and increase of its own Grad-CAM, in percent."""
    from torchcam.methods import GradCAM
    from torchcam.metrics import ClassificationMetric

    with GradCAM(model, pooled_layer(model.model)) as extractor:
        metric = ClassificationMetric(extractor)
        for part in pixel_values.split(16):
            metric.update(part.clone().requires_grad_())
    return 100 * torch.tensor(list(metric.summary().values()))


def contenders(count: int) -> dict[str, dict[str, Callable]]:
    """By metric: castream first, then the peer; each returns values that can be subtracted."""
    model, pixel_values = efficientnet_lite0(), images(count)
    network = Probabilities(model, "gap").eval()
    features = extract(model, pixel_values)
    target = features.logits("gap").argmax(1)
    saliency = upsample_maps(explain_features(features, target, "grad_cam", "gap"), pixel_values.shape[2:])
    height, width = saliency.shape[1:]
    mask = torch.zeros(count, height, width, dtype=torch.bool)
    mask[:, height // 4 : -height // 4, width // 4 : -width // 4] = True  # an object, say
    arrays = {"x_batch": pixel_values, "y_batch": target, "a_batch": saliency[:, None]}
    arrays = {name: tensor.numpy() for name, tensor in arrays.items()}
    masked = arrays | {"s_batch": mask[:, None].numpy()}
    ours, step = Ours(model, pixel_values), pixels_per_step(height, width)
    flipping = {"features_in_step": step, "perturb_baseline": 0.0}
    assert num_steps(height, width) * step == height * width
    return {
        "deletion": {
            "castream": ours.deletion_curve,
            # a step of values, not pixels: three of its steps make one
            "Quantus PixelFlipping": lambda: quantus_metric("PixelFlipping", network, arrays, **flipping)[:, 2::3],
        },
        "average drop and increase": {
            "castream, in normalised space": partial(ours.drop_and_increase, True),
            "torch-cam ClassificationMetric": partial(torch_cam_metric, Explained(model, "gap").eval(), pixel_values),
            "castream, in pixel space": ours.drop_and_increase,
        },
        "mask_share": {
            "castream": partial(mask_share, saliency, mask),
            "Quantus RelevanceMassAccuracy": partial(quantus_metric, "RelevanceMassAccuracy", network, masked),
        },
        "pointing_game": {
            "castream": lambda: pointing_hit(saliency, mask).float(),
            "Quantus PointingGame": partial(quantus_metric, "PointingGame", network, masked),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| metric | | processor seconds an image | relative | value | largest difference |\n|" + " --- |" * 6)
    for metric, runs in contenders(options.photos).items():
        first, *_ = values = {name: run() for name, run in runs.items()}  # and what later runs keep is made
        taken = take_turns(runs, options.rounds, 0, "cpu")
        for name, found in values.items():
            pairs = list(zip(taken[name], taken[first], strict=True))
            ratio = statistics.median(one[1] / other[1] for one, other in pairs)
            seconds = statistics.median(one[1] for one, _ in pairs) / options.photos
            value = found if metric == "average drop and increase" else found.mean()[None]
            value = ", ".join(f"{one:.5g}" for one in value.tolist())
            largest = (found - values[first]).abs().max()
            print(f"| {metric} | {name} | {seconds:.2g} | {ratio:.2f} | {value} | {largest:.1e} |")


if __name__ == "__main__":
    main()
