"""`python -m evaluation` in a checkout; the same as `python -m castream.evaluation`."""

import sys

from castream.evaluation.command import main

sys.exit(main())
