"""Makes the modules of examples/translation importable, as they are for a person who runs its scripts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "translation"))
