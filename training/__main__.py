"""`accelerate launch -m castream.training`: train.py, where only the package is installed."""

import sys

from castream.training.run import run

if __name__ == "__main__":
    sys.exit(run())
