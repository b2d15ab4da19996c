"""`python -m emarecipes.models.prepare NAME`."""

import sys

from emarecipes.models.prepare import main

sys.exit(main())
