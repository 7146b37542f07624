"""Restore several photos at once, each with a seed of its own.

python examples/03_many_photos.py [PHOTO …]

Photos of one working size go through the networks together. Each result equals what the photo gives alone.
"""

import sys
from pathlib import Path

from engine import Restorer
from engine.image.files import write_photo

SAMPLE = Path(__file__).parent.parent / "tests" / "data" / "coffee-damaged.jpg"
photos = [Path(name) for name in sys.argv[1:]] or [SAMPLE, SAMPLE]

with Restorer.open() as restorer:
    results = restorer.restore_batch(photos, seeds=range(len(photos)), steps=4)

for number, (photo, result) in enumerate(zip(photos, results, strict=True)):
    output = Path(f"03-{number}.png")
    write_photo(output, result.photo, result.provenance, overwrite=True)
    print(f"{photo.name} → {output}, seed {result.settings.seed}")
