"""Time and memory of explanations beside the peers', in one run, on the same model and images.

    python -m benchmarks.saliency [--networks ResNet-50 EfficientNet-Lite0] [--rounds 7] [--threads 2] [--device cuda]

All contenders take their turn in every round, each round in another order; figures are medians over rounds, and ratios
the medians of the rounds' own ratios, so that a busy machine disturbs all alike. Memory is the peak of a process of its
own.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from castream.artifacts.process import keep_freed_memory
from torch import nn

from benchmarks.curves import curve_contenders
from benchmarks.memory import forget_peak, hardware, peak, resident, wait
from benchmarks.networks import NETWORKS, images, masking_layer, pooled_layer
from benchmarks.peers import Logits, captum, pytorch_grad_cam, torch_cam, trainable_copy
from modeling_castream import explain
from modeling_castream.saliency_castream import explain_features, extract

POOLINGS = ("gap", "ca")
KINDS = ("grad_cam", "score_cam", "curves")


def forward(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """The plain forward pass."""
    with torch.no_grad():
        return model(pixel_values, pooling="ca").logits


def grad_cam_contenders(network: str, batch_size: int, device: str) -> dict[str, Callable]:
    """Grad-CAM of a given class, under "ca", as each package does it; the first one is the plain forward pass.

    castream takes its turn three times: in float32, under autocast to bfloat16, and without being given the class, so
    that it has to predict it.
    """
    model, pixel_values = NETWORKS[network]().to(device), images(batch_size).to(device)
    target = forward(model, pixel_values).argmax(-1)
    labels, frozen, layer = target.tolist(), Logits(model, "ca"), pooled_layer(model)
    trainable = trainable_copy(model)
    default = Logits(trainable, "ca")

    def in_bfloat16():
        with torch.autocast(device, torch.bfloat16):
            return explain(model, pixel_values, target, "grad_cam", "ca")

    return {
        "forward pass": partial(forward, model, pixel_values),
        "castream": partial(explain, model, pixel_values, target, "grad_cam", "ca"),
        "castream, bfloat16": in_bfloat16,
        "castream, predicted class": partial(explain, model, pixel_values, None, "grad_cam", "ca"),
        "captum": partial(captum, "LayerGradCam", frozen, layer, pixel_values, labels),
        "torch-cam": partial(torch_cam, "GradCAM", frozen, layer, pixel_values, labels),
        "pytorch-grad-cam": partial(
            pytorch_grad_cam, "GradCAM", default, pooled_layer(trainable), pixel_values, labels
        ),
        "pytorch-grad-cam, frozen, input with gradient": lambda: pytorch_grad_cam(
            "GradCAM", frozen, layer, pixel_values.clone().requires_grad_(), labels
        ),
    }


def score_cam_contenders(network: str, device: str) -> dict[str, Callable]:
    """Score-CAM of one image under both poolings; the peer knows no poolings, and runs twice."""
    model, pixel_values = NETWORKS[network]().to(device), images(1).to(device)
    target = forward(model, pixel_values).argmax(-1)
    name, layer = masking_layer(model)

    def castream(**options):
        return explain_features(extract(model, pixel_values), target, "score_cam", POOLINGS, layer=name, **options)

    def peer():
        for pooling in POOLINGS:
            pytorch_grad_cam("ScoreCAM", Logits(model, pooling), layer, pixel_values, target.tolist())

    return {
        "pytorch-grad-cam, two runs": peer,
        "castream": castream,
        "castream, bfloat16": partial(castream, autocast_dtype=torch.bfloat16),
    }


def insertion_deletion_contenders(network: str, batch_size: int, device: str) -> dict[str, Callable]:
    """Insertion and deletion for both poolings; the first one is the forward passes that they need."""
    return curve_contenders(NETWORKS[network]().to(device), images(batch_size).to(device))


def contenders_of(kind: str, network: str, options: argparse.Namespace) -> dict[str, Callable]:
    """The contenders of a table, each a call without arguments; the others are compared with the first one."""
    if kind == "score_cam":
        return score_cam_contenders(network, options.device)
    make = grad_cam_contenders if kind == "grad_cam" else insertion_deletion_contenders
    return make(network, options.batch_size, options.device)


def take_turns(
    contenders: dict[str, Callable], rounds: int, warm_up: int, device: str
) -> dict[str, list[tuple[float, float]]]:
    """Seconds and processor seconds of every contender in every round after those of `warm_up`."""
    names, seconds = list(contenders), {name: [] for name in contenders}
    for index in range(warm_up + rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter(), time.process_time()
            contenders[name]()
            wait(device)
            if index >= warm_up:
                seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return seconds


def peak_of(run: Callable, device: str) -> int:
    """By how many MiB a contender raises the peak memory."""
    before = resident(device)
    forget_peak(device)
    run()
    return round(peak(device) - before)


def measured_peak(kind: str, network: str, contender: str, run: Callable, options: argparse.Namespace) -> int:
    """`peak_of`; on a CPU in a fresh process, whose memory no other contender has raised."""
    if options.device == "cuda":
        return peak_of(run, options.device)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.saliency", "--threads", str(options.threads)]
    command += ["--batch-size", str(options.batch_size), "--peak-of", kind, network, contender]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def report(kind: str, network: str, contenders: dict[str, Callable], rounds: int, options: argparse.Namespace) -> None:
    """Let the contenders take turns and print the table; the first one is what the others are compared with."""
    warm_up = 0 if kind == "score_cam" and options.device == "cpu" else 1  # there it takes minutes
    seconds = take_turns(contenders, rounds, warm_up, options.device)
    base, *_ = seconds
    heads = ("", "seconds", f"relative to {base}", "processor seconds, relative", "peak memory, MiB")
    print(f"\n{kind}, {network}\n\n| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for name, values in seconds.items():
        wall, processor = (
            statistics.median(one[clock] / other[clock] for one, other in zip(values, seconds[base], strict=True))
            for clock in (0, 1)
        )
        peak = "" if options.no_memory else measured_peak(kind, network, name, contenders[name], options)
        median = statistics.median(value[0] for value in values)
        print(f"| {name} | {median:.3f} | {wall:.3f} | {processor:.3f} | {peak} |", flush=True)


def correlation(contenders: dict[str, Callable]) -> float:
    """Of castream's maps in bfloat16 and float32, the lower one of the poolings."""
    found = [contenders[name]() for name in ("castream", "castream, bfloat16")]
    exact, quick = (list(maps.values()) if isinstance(maps, dict) else [maps] for maps in found)
    pairs = [torch.stack([one.flatten(), other.flatten()]) for one, other in zip(exact, quick, strict=True)]
    return min(float(torch.corrcoef(pair)[0, 1]) for pair in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=KINDS, default=KINDS, help="curves: insertion and deletion")
    parser.add_argument("--rounds", type=int, default=7, help="of Grad-CAM")
    parser.add_argument("--score-cam-rounds", type=int, default=2)
    parser.add_argument("--curve-rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4, help="images at a time; Score-CAM takes one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--peak-of", nargs=3, metavar=("KIND", "NETWORK", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        kind, network, contender = options.peak_of
        print(peak_of(contenders_of(kind, network, options)[contender], options.device))
        return
    print(f"{hardware(options.device, options.threads)}, load {os.getloadavg()[0]:.1f} at the start")
    rounds = {"grad_cam": options.rounds, "score_cam": options.score_cam_rounds, "curves": options.curve_rounds}
    for kind in sorted(options.methods, key=KINDS.index):
        if kind == "curves":  # as the evaluation's command does, and for the rest of this process
            keep_freed_memory()
        for network in options.networks:
            contenders = contenders_of(kind, network, options)
            report(kind, network, contenders, rounds[kind], options)
            if "castream, bfloat16" in contenders:
                alike = correlation(contenders)
                print(f"\ncorrelation of the bfloat16 maps with the float32 ones: {alike:.5f}", flush=True)


if __name__ == "__main__":
    main()
