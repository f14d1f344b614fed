"""Pictures per second of one loading process of examples/vision: decode, crop, mirror.

    python benchmarks/vision_loader.py --data DATA/clothing_small_96

`large` are the same pictures, enlarged to the usual size of ImageNet's (shorter side 375 pixels) and saved as JPEG of
quality 90: as many pixels to decode, but smoother ones. Times are CPU time, which other load affects less.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
import PIL
from PIL import Image

sys.path.insert(0, str(measure.ROOT / "examples"))
sys.path.insert(0, str(measure.ROOT / "examples" / "vision"))

import images


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="folder with train.parquet, or a tree of classes; default: drawn pictures")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    source = images.load(args.data, "train", limit=args.pictures)
    stored = [enlarged(images.decode(source, row), 375) for row in range(len(source))]
    large = images.Source(source.labels, source.classes, lambda row: Image.open(io.BytesIO(stored[row])), source.name)
    rows = []
    for kind, pictures, size in (("as they are", source, 64), ("as they are", source, 224), ("large", large, 224)):
        for work, change in (("training", images.Training(size)), ("evaluation", images.Evaluation(size))):
            rows.append({"pictures": kind, "work": work, "size": size, **figures(pictures, change)})
    name = Path(args.data).name if args.data else "drawn pictures"
    measure.write("vision_loader", rows, args.out, f"Pillow {PIL.__version__}; {len(source)} pictures of {name}")


def enlarged(image: Image.Image, shorter: int) -> bytes:
    """Return a JPEG file of the picture, enlarged to `shorter` pixels on its shorter side."""
    scale = shorter / min(image.size)
    buffer = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale))).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def figures(source: images.Source, change: images.Training | images.Evaluation) -> dict[str, Any]:
    """Return pictures per second, of the faster of two passes."""
    seconds = []
    for epoch in range(2):
        loader = images.Loader(source, change, seed=0, workers=0, skip=False)
        started = time.process_time()
        for _ in loader([[(epoch, row) for row in rows] for rows in np.array_split(range(len(source)), 16)]):
            pass
        seconds.append(time.process_time() - started)
    return {"pictures_per_second_per_worker": round(len(source) / min(seconds))}


if __name__ == "__main__":
    main()
