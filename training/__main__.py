"""`accelerate launch -m castream.training`: train.py, where only the package is installed."""

import os
import sys

# Before torch is imported: on a busy machine, threads that spin while they wait take the CPU from one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from castream.training.run import run

if __name__ == "__main__":
    sys.exit(run())
