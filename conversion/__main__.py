"""`python -m conversion` in a checkout; the same as `python -m castream.conversion`."""

import sys

from castream.conversion.command import main

sys.exit(main())
