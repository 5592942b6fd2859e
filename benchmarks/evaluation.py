"""Processor seconds of an evaluation with all methods and curves, in this castream and in another one's environment.

    python -m benchmarks.evaluation --model DIR --photos DIR --other OTHER/bin/python [--max-photos 16] [--rounds 3]

Each version is a process of its own that stays, evaluates one map uncounted, and then takes its turn in every round;
ratios are the medians of the rounds' own. What evaluates under `--other` is that environment's castream.
"""

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

METHODS = (
    "raw_attention",
    "attention_cam",
    "grad_cam",
    "cosine_cam",
    "grad_cam_plus_plus",
    "hires_cam",
    "layer_cam",
    "xgrad_cam",
    "ablation_cam",
    "eigen_cam",
)


def serve(options: argparse.Namespace) -> None:
    """For every line of standard input one evaluation, whose processor seconds are printed."""
    import torch
    from castream.evaluation import EvaluationSettings, evaluate_saliency
    from PIL import Image
    from transformers import AutoImageProcessor

    from modeling_castream import CAStreamForImageClassification

    try:  # as the evaluation's command does in either version
        from castream.artifacts.process import keep_freed_memory
    except ModuleNotFoundError:
        from castream.evaluation.allocator import keep_freed_memory  # its place up to a27b579
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    model = CAStreamForImageClassification.from_pretrained(options.model).eval()
    processor = AutoImageProcessor.from_pretrained(options.model)
    photos = sorted(Path(options.photos).glob("*.jpg"))[: options.max_photos]
    examples = [{"id": photo.name, "image": Image.open(photo).convert("RGB")} for photo in photos]
    settings = EvaluationSettings(METHODS, batch_size=options.batch_size, autocast=options.serve, num_examples=0)
    evaluate_saliency(model, processor, examples, replace(settings, methods=("grad_cam",), metrics=("average_drop",)))
    for _ in sys.stdin:
        start = time.process_time()
        evaluate_saliency(model, processor, examples, settings)
        print(time.process_time() - start, flush=True)


def start(python: str, autocast: str, arguments: list[str]) -> subprocess.Popen:
    """A process that serves."""
    command = [python, "-P", "-W", "ignore", __file__, "--serve", autocast, *arguments]  # -P: not this folder's modules
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def seconds(server: subprocess.Popen) -> float:
    """Of one more evaluation."""
    server.stdin.write("\n")
    server.stdin.flush()
    return float(server.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that both versions load")
    parser.add_argument("--photos", required=True, help="a folder of JPEGs")
    parser.add_argument("--other", default=sys.executable, help="the other castream's Python")
    parser.add_argument("--max-photos", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16, help="images per forward pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    arguments = ["--model", options.model, "--photos", options.photos]
    arguments += ["--max-photos", str(options.max_photos), "--threads", str(options.threads)]
    arguments += ["--batch-size", str(options.batch_size)]
    servers = {
        "other, float32": start(options.other, "off", arguments),
        "float32": start(sys.executable, "off", arguments),
        "auto": start(sys.executable, "auto", arguments),
    }
    taken = {name: [] for name in servers}
    for _ in range(options.rounds):
        for name, server in servers.items():
            taken[name].append(seconds(server))
            print(name, taken[name][-1], file=sys.stderr, flush=True)
    for server in servers.values():
        server.communicate()
    base, *_ = servers
    print("| | processor seconds | as fast as the first |\n| --- | --- | --- |")
    for name, found in taken.items():
        ratio = statistics.median(one / other for one, other in zip(taken[base], found, strict=True))
        print(f"| {name} | {statistics.median(found):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
