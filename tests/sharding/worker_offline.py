"""Exports checkpoints of several ranks in one process: OUT/checkpoints/NAME becomes OUT/offline/NAME.

The outcome, by name, is OUT/offline.json: null, or the sentence that says why it could not be done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gap_ds.cli.export import export


def main(out: Path, names: list[str]) -> None:
    said = {}
    for name in names:
        try:
            export(out / "checkpoints" / name, out / "offline" / name, "dense", None, "float32", False, lambda *_: None)
            said[name] = None
        except ValueError as error:
            said[name] = str(error)
    (out / "offline.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
