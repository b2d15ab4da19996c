"""`python -m emarecipes.plan CONFIG`."""

import sys

from emarecipes.plan import run_plan

sys.exit(run_plan(sys.argv[1:]))
