"""Makes the modules of the examples importable, as they are for a person who runs their scripts."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "translation"), str(EXAMPLES / "vision")]
