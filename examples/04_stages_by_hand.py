"""Call the stages of a restoration one by one: encode, condition, sample, decode.

python examples/04_stages_by_hand.py [PHOTO]

This leaves out what `Restorer.restore` does around them: tiles, the restoration pull, the colour fix, metadata.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from engine import Restorer

SAMPLE = Path(__file__).parent.parent / "tests" / "data" / "coffee-damaged.jpg"
photo = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLE

with Restorer.open() as restorer:
    settings = restorer.defaults.updated({"steps": 4, "restore_pull": None, "seed": 7})

    # The networks take float32 [B, 3, H, W] in [-1, 1], with sides that are multiples of 64.
    image = Image.open(photo).convert("RGB")
    image = image.resize((image.width // 64 * 64, image.height // 64 * 64), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1

    z_lq = restorer.stages.encode(pixels)  # the photo's latent
    stage1 = restorer.stages.decode(z_lq)  # what the photo looks like without sampling
    texts = restorer.stages.conditioning(settings)  # positive and negative text
    z = restorer.stages.sample(z_lq, texts, settings)
    restored = restorer.stages.decode(z)

for name, result in (("04-stage1.png", stage1), ("04-restored.png", restored)):
    rgb = ((result[0].clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(rgb).save(name)
    print(f"{name}: {rgb.shape[1]} × {rgb.shape[0]}")
