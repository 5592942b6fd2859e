"""Which peer's method equals which of ours, and by how much they differ: prints the table of `evaluation/PEERS.md`.

    python -m benchmarks.agreement [--networks ResNet-50 EfficientNet-Lite0] [--images 2]

Where a definition differs, the row says why, and the difference is measured all the same.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.networks import NETWORKS, images, masking_layer, pooled_layer
from benchmarks.peers import Logits, LogProbability, captum, pytorch_grad_cam, torch_cam, trainable_copy
from modeling_castream import explain

HEAVY_SIZE = 64  # pixels of the images of methods that pass each channel through the network
LOW = {"upsample": False}
SIGNED = {"upsample": False, "relu": False, "normalize": False}


@dataclass(frozen=True, eq=False)
class Row:
    """One comparison.

    Args:
        peer: package and method, as a table shows them.
        setting: what the peer is called with.
        run: the peer's maps, of (network, layer, pixel_values, target).
        method: ours.
        options: `explain`'s.
        rescaled: whether the peer scales once more after upsampling.
        scale: factor on the logits, for both, in this comparison.
        why: how the definitions differ; empty where they are the same.
        poolings: those for which the comparison makes sense.
        heavy: whether it passes each channel through the network.
    """

    peer: str
    setting: str
    run: Callable
    method: str
    options: dict
    rescaled: bool = False
    scale: float = 1.0
    why: str = ""
    poolings: tuple[str, ...] = ("ca", "gap")
    heavy: bool = False


def _pytorch_grad_cam(name: str, method: str, setting: str = "defaults", run: dict | None = None, **kwargs) -> Row:
    peer = partial(pytorch_grad_cam, name, **(run or {}))
    return Row(f"pytorch-grad-cam {name}", setting, peer, method, kwargs.pop("options", {}), rescaled=True, **kwargs)


def _torch_cam(name: str, method: str, setting: str = "defaults", options: dict = LOW, **kwargs) -> Row:
    return Row(f"torch-cam {name}", setting, partial(torch_cam, name), method, options, **kwargs)


ROWS = (
    _pytorch_grad_cam("GradCAM", "grad_cam"),
    _pytorch_grad_cam("HiResCAM", "hires_cam"),
    _pytorch_grad_cam("LayerCAM", "layer_cam"),
    _pytorch_grad_cam("XGradCAM", "xgrad_cam"),
    _pytorch_grad_cam("GradCAMPlusPlus", "grad_cam_plus_plus", "logits times 1000", scale=1000.0),
    _pytorch_grad_cam(
        "GradCAMPlusPlus",
        "grad_cam_plus_plus",
        why="1e-6 is added to the denominator, as large as the squared gradients themselves; ours adds 2.2e-16",
    ),
    _pytorch_grad_cam("ScoreCAM", "score_cam", "target: log-probability", {"targets": LogProbability}, heavy=True),
    _pytorch_grad_cam(
        "ScoreCAM", "score_cam", why="weights are a softmax over channels of the logits, not probabilities", heavy=True
    ),
    _pytorch_grad_cam("AblationCAM", "ablation_cam", heavy=True),
    _pytorch_grad_cam("EigenCAM", "eigen_cam", why="channels are centred first; the sign is left to chance"),
    _torch_cam("GradCAM", "grad_cam"),
    _torch_cam("LayerCAM", "layer_cam"),
    _torch_cam("XGradCAM", "xgrad_cam"),
    _torch_cam(
        "GradCAMpp",
        "grad_cam_plus_plus",
        why="alpha is g^2 without its denominator: the division in place acts on a copy",
    ),
    Row(
        "torch-cam CAM",
        "fc_layer: the classifier",
        lambda network, *args: torch_cam("CAM", network, *args, fc_layer=network.model.classifier),
        "grad_cam",
        {"relu": False, **LOW},
        poolings=("gap",),
    ),
    _torch_cam(
        "ScoreCAM",
        "score_cam",
        why="masks upsampled without aligned corners; softmax over channels of logit minus the image's logit",
        heavy=True,
    ),
    Row("captum LayerGradCam", "defaults", partial(captum, "LayerGradCam"), "grad_cam", SIGNED),
    Row(
        "captum LayerGradientXActivation",
        "summed over channels",
        partial(captum, "LayerGradientXActivation"),
        "hires_cam",
        SIGNED,
    ),
)


def difference(row: Row, model: nn.Module, pixel_values: torch.Tensor, target: list[int], pooling: str) -> float:
    """Largest difference between a peer's maps and ours, relative to the largest value of ours.

    Args:
        model: a CAStreamForImageClassification.
    """
    peer_model = trainable_copy(model)
    with torch.no_grad():
        for part in (peer_model.classifier.weight, peer_model.classifier.bias):
            part.mul_(row.scale)
        ours_model = copy.deepcopy(peer_model)
    name, layer = -1, pooled_layer(peer_model)
    if row.method == "score_cam":
        name, layer = masking_layer(peer_model)
    theirs = row.run(Logits(peer_model, pooling), layer, pixel_values, target)
    ours = explain(ours_model, pixel_values, target, row.method, pooling, layer=name, **row.options)
    if row.rescaled:
        low, high = ours.amin((1, 2), keepdim=True), ours.amax((1, 2), keepdim=True)
        ours = (ours - low) / (high - low).clamp_min(1e-7)
    return float((theirs - ours).abs().max() / ours.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument(
        "--no-heavy", action="store_true", help="skip methods that pass each channel through the network"
    )
    options = parser.parse_args()
    rows = [row for row in ROWS if not (row.heavy and options.no_heavy)]
    found = {}
    for name in options.networks:
        model = NETWORKS[name]()
        for row in tqdm(rows, desc=name):
            pixel_values = images(1, HEAVY_SIZE) if row.heavy else images(options.images)
            for pooling in row.poolings:
                with torch.no_grad():
                    target = model(pixel_values, pooling=pooling).logits.argmax(-1).tolist()
                found[row, name, pooling] = difference(row, model, pixel_values, target, pooling)
    print_table(rows, options.networks, found)


def print_table(rows: list[Row], networks: list[str], found: dict[tuple, float]) -> None:
    """One line per comparison, one column per network and pooling."""
    columns = [(name, pooling) for name in networks for pooling in ("ca", "gap")]
    heads = [
        "peer",
        "called with",
        "ours",
        *(f"{name}, {pooling.upper()}" for name, pooling in columns),
        "same definition",
    ]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for row in rows:
        differences = [found.get((row, *column)) for column in columns]
        shown = ["" if one is None else f"{one:.0e}" for one in differences]
        same = f"no: {row.why}" if row.why else "yes"
        print("| " + " | ".join([row.peer, row.setting, row.method, *shown, same]) + " |")


if __name__ == "__main__":
    main()
