"""Train the attention stream of a CA-Stream model.

    accelerate launch train.py                                          the demo, on embedded scenes
    accelerate launch train.py --config recipes/imagenet_resnet50.yaml  a recipe; any line of it can be overridden:
    accelerate launch train.py --config recipes/photos_distill.yaml --dataset_name ~/photos --output_dir outputs/photos

A run that was killed goes on when the same command is given again. Exit code 0: done; 2: bad input, or a run that
diverged, in one line; 75: told to stop (SIGTERM, SIGINT), with everything saved.
"""

import os
import sys

# Before torch is imported: on a busy machine, threads that spin while they wait take the CPU from one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from castream.training.run import run

if __name__ == "__main__":
    sys.exit(run())
