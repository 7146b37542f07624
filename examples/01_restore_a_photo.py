"""Restore a photo and save it with its settings.

python examples/01_restore_a_photo.py [PHOTO]

Uses the bundle that `python export/build_engines.py` builds, or $RESTORE_BUNDLE. Writes 01.png.
"""

import sys
from pathlib import Path

from engine import Restorer
from engine.image.files import write_photo

SAMPLE = Path(__file__).parent.parent / "tests" / "data" / "coffee-damaged.jpg"
photo = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLE

with Restorer.open() as restorer:
    result = restorer.restore(photo)

# The file keeps the photo's metadata, and says how it was made: `--like 01.png` repeats it.
write_photo(Path("01.png"), result.photo, result.provenance, overwrite=True)
height, width, _ = result.photo.rgb.shape
print(f"01.png: {width} × {height}, seed {result.settings.seed}")
