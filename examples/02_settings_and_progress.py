"""Change settings, follow the steps, and catch what a user can mend.

python examples/02_settings_and_progress.py [PHOTO]
"""

import sys
from pathlib import Path

from engine import Restorer
from engine.errors import RestoreError

SAMPLE = Path(__file__).parent.parent / "tests" / "data" / "coffee-damaged.jpg"
photo = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLE

with Restorer.open() as restorer:
    steps = 4

    def show(progress):
        """Print a line per step; an exception raised here would end the restoration."""
        print(f"step {progress.step.index + 1} of {steps}, sigma {progress.step.sigma:.2f}")

    result = restorer.restore(photo, steps=steps, cfg_scale=(2.0, 1.5), color_fix="adain", seed=7, on_step=show)
    print(result.settings.model_dump_json(indent=1))

    # Every failure that a user can mend is a RestoreError, which says what to do.
    try:
        restorer.restore(photo, steps=0)
    except RestoreError as error:
        print(f"refused: {error}")
