"""What the paper publishes, to print beside what is measured here."""

from __future__ import annotations

from typing import NamedTuple


class Scores(NamedTuple):
    """PSNR in dB, SSIM and LPIPS, means over a set of images."""

    psnr: float
    ssim: float
    lpips: float


#: Table 1, by degradation and by our presets' names. Its fourth block repeats the third's label.
TABLE_1 = {
    "blur σ=3, noise σ=30": {
        "ours": Scores(32.19, 0.7434, 0.0932),
        "lightning-lora": Scores(29.37, 0.5834, 0.1232),
        "hwxl-lora": Scores(28.87, 0.6025, 0.1183),
        "supir": Scores(29.46, 0.4203, 0.1402),
        "lightning": Scores(29.63, 0.5523, 0.2085),
        "hwxl": Scores(29.13, 0.5856, 0.1490),
    },
    "×4": {
        "ours": Scores(29.64, 0.6382, 0.0916),
        "lightning-lora": Scores(29.03, 0.5795, 0.1328),
        "hwxl-lora": Scores(28.78, 0.6004, 0.1265),
        "supir": Scores(29.81, 0.5934, 0.1432),
        "lightning": Scores(28.57, 0.5357, 0.2250),
        "hwxl": Scores(28.64, 0.5774, 0.1688),
    },
    "blur σ=2, ×4, noise σ=1": {
        "ours": Scores(29.38, 0.5651, 0.1250),
        "lightning-lora": Scores(28.11, 0.5436, 0.1414),
        "hwxl-lora": Scores(28.65, 0.5609, 0.1293),
        "supir": Scores(27.75, 0.4702, 0.1306),
        "lightning": Scores(27.33, 0.4694, 0.2880),
        "hwxl": Scores(28.78, 0.5495, 0.1803),
    },
}
#: Table 2, 60 real images.
TABLE_2 = {
    "PASD": Scores(26.87, 0.4513, 0.1828),
    "StableSR": Scores(19.76, 0.4051, 0.2418),
    "DiffBIR": Scores(28.72, 0.4663, 0.1289),
    "SUPIR": Scores(27.74, 0.4702, 0.1306),
    "the paper's": Scores(29.38, 0.5651, 0.1250),
}
#: Table 3, seconds an image. The paper names neither the hardware nor the size of the images.
TABLE_3 = {"PASD": 28.65, "StableSR": 1013.0, "DiffBIR": 45.20, "SUPIR": 18.44, "the paper's": 11.28}
