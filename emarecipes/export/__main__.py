"""`python -m emarecipes.export gguf ADAPTER_DIR`."""

import sys

from emarecipes.export import main

sys.exit(main())
