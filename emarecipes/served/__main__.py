"""`python -m emarecipes.served CONFIG --adapter DIR --model PROVIDER/NAME`."""

import sys

from emarecipes.served import run_served

sys.exit(run_served(sys.argv[1:]))
