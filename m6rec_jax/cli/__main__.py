"""`python -m m6rec_jax.cli`: the command where it is not installed."""

import sys

from m6rec_jax.cli import main

sys.exit(main())
