"""`python publish.py` in a checkout; the same as `castream publish`."""

import sys

from castream.publishing.command import main

if __name__ == "__main__":
    sys.exit(main())
