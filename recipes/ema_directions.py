"""Directions along which an undefended run moved the model, for defenses that hold or ablate them.

tune run recipes/ema_directions.py --config configs/smollm2_135m_directions.yaml [key=value]
"""

import sys

from emarecipes.persona.directions import run_directions

if __name__ == "__main__":
    sys.exit(run_directions(sys.argv[1:]))
