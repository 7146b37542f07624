"""Landscapes and portraits made by program: the families that the LoRAs are trained on."""

from __future__ import annotations

import colorsys
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from export.demo.paint import Colour, curve, field, gradient, hsv, palette_of, pick

# -- landscapes -----------------------------------------------------------------------------------


def paint_landscape(rng: np.random.Generator, size: int) -> tuple[Image.Image, str]:
    """Return a landscape, drawn, and the words for it: sky, ridges in haze, water, trees, grass."""
    horizon = int(size * rng.uniform(0.3, 0.65))
    evening = rng.random() < 0.3
    top = hsv(rng, (0.55, 0.66), (0.25, 0.8), (0.35, 0.95))
    low = hsv(rng, (0.02, 0.14), (0.3, 0.8), (0.7, 1.0)) if evening else hsv(rng, (0.5, 0.62), (0.05, 0.3), (0.8, 1.0))
    ramp = np.linspace(0, 1, size)[:, None, None] ** rng.uniform(0.5, 1.5)
    sky = np.broadcast_to(np.array(top) * (1 - ramp) + np.array(low) * ramp, (size, size, 3))
    clouds = np.clip(field(rng, size, size, (1.6, 2.2), stretch=2) - rng.uniform(-0.5, 1.0), 0, 1)[:, :, None]
    scene = sky + clouds * rng.uniform(0.3, 0.9) * (245 - sky)
    layers = int(rng.integers(2, 5))
    hue = rng.uniform(0.2, 0.42)
    for layer in range(layers):
        near = (layer + 1) / layers
        base = horizon + (size - horizon) * 0.55 * layer / layers
        ridge = base - size * rng.uniform(0.04, 0.25) * _ridge(rng, size, rng.uniform(0.45, 0.75))
        colour = np.array(hsv(rng, (hue - 0.05, hue + 0.05), (0.2 + 0.3 * near, 0.3 + 0.4 * near), (0.2, 0.6)))
        colour = colour * near + np.array(low) * (1 - near)  # haze
        rough = field(rng, size, size, (0.9, 1.7))[:, :, None] * (10 + 45 * near) * rng.uniform(0.3, 1.0)
        inside = np.clip(np.arange(size)[:, None] - ridge[None, :], 0, 1)[:, :, None]
        scene = scene * (1 - inside) + (colour + rough) * inside
    words = "a landscape"
    water = rng.random() < 0.3
    if water:
        line = int(size * rng.uniform(0.65, 0.85))
        rows = np.clip(2 * line - np.arange(line, size), 0, size - 1)
        ripple = field(rng, size, size - line, (0.9, 1.4), stretch=6)[:, :, None]
        scene[line:] = scene[rows] * rng.uniform(0.5, 0.9) + ripple * rng.uniform(4, 18)
        words += " with a lake"
    canvas = Image.fromarray(scene.clip(0, 255).astype(np.uint8))
    trees = int(rng.integers(0, 7))
    for _ in range(trees):
        ground = rng.uniform(horizon + 0.1 * size, 1.05 * size)
        _tree(canvas, rng, rng.uniform(0, size), ground, size * rng.uniform(0.12, 0.55), hue)
    if not water and rng.random() < 0.7:
        _grass(canvas, rng, size * rng.uniform(0.7, 0.95), hue)
    return canvas, words + (" with trees" if trees else "")


def _ridge(rng: np.random.Generator, size: int, roughness: float) -> NDArray[np.float64]:
    """Return a fractal line f64[size], about -1 … 1, by midpoint displacement."""
    line, scale = rng.uniform(-1, 1, 2), 1.0
    while len(line) < size:
        middles = (line[:-1] + line[1:]) / 2 + rng.uniform(-scale, scale, len(line) - 1) * 0.5
        joined = np.empty(len(line) + len(middles))
        joined[::2], joined[1::2] = line, middles
        line, scale = joined, scale * roughness
    start = int(rng.integers(0, len(line) - size + 1))
    return line[start : start + size]


def _tree(canvas: Image.Image, rng: np.random.Generator, x: float, ground: float, height: float, hue: float) -> None:
    draw = ImageDraw.Draw(canvas)
    bark = hsv(rng, (0.04, 0.1), (0.2, 0.5), (0.1, 0.35))
    draw.line(
        [(x, ground), (x + rng.normal(0, 0.04) * height, ground - 0.6 * height)],
        fill=bark,
        width=max(1, int(height * 0.05)),
    )
    middle = ground - 0.68 * height
    leaves = int(80 + 1.6 * height)
    spread = rng.normal(0, 1, (leaves, 2)) * np.array([0.2, 0.17]) * height
    light = 0.5 - 0.5 * spread[:, 1] / (0.4 * height) + rng.normal(0, 0.18, leaves)  # the sun is above
    long, turn = rng.uniform(1.5, 6.0, leaves), rng.uniform(0, math.pi, leaves)
    shift = rng.uniform(-0.04, 0.04)
    for (dx, dy), bright, length, angle in zip(spread, light, long, turn, strict=True):
        red, green, blue = colorsys.hsv_to_rgb((hue + shift) % 1, 0.6, float(np.clip(0.15 + 0.5 * bright, 0.05, 0.9)))
        u, v = length * math.cos(angle), length * math.sin(angle)
        px, py = x + dx, middle + dy
        draw.polygon(
            [(px - u, py - v), (px - v * 0.4, py + u * 0.4), (px + u, py + v), (px + v * 0.4, py - u * 0.4)],
            fill=(int(red * 255), int(green * 255), int(blue * 255)),
        )


def _grass(canvas: Image.Image, rng: np.random.Generator, top: float, hue: float) -> None:
    draw = ImageDraw.Draw(canvas)
    size = canvas.width
    for row in np.sort(rng.uniform(top, size * 1.05, int(rng.uniform(300, 900)))):
        x, near = rng.uniform(0, size), (row - top) / (size - top + 1)
        tip = (x + rng.normal(0, 5), row - rng.uniform(5, 12 + 25 * near))
        draw.line(
            [(x, row), tip],
            fill=hsv(rng, (hue - 0.06, hue + 0.04), (0.4, 0.8), (0.15, 0.7)),
            width=int(rng.integers(1, 4)),
        )


# -- portraits ------------------------------------------------------------------------------------


def paint_portrait(rng: np.random.Generator, size: int) -> tuple[Image.Image, str]:
    """Return a head and shoulders, drawn, and the words for it: shaded skin, eyes, strands of hair."""
    backdrop = Image.fromarray(gradient(rng, size, size, pick(rng, palette_of(rng)), pick(rng, palette_of(rng))))
    canvas = backdrop.filter(ImageFilter.GaussianBlur(size * 0.02))
    skin = np.array(hsv(rng, (0.03, 0.09), (0.2, 0.6), (0.35, 0.98)), dtype=np.float64)
    hair = hsv(rng, (0.03, 0.13), (0.1, 0.8), (0.05, 0.75))
    x, y = size * rng.uniform(0.4, 0.6), size * rng.uniform(0.4, 0.52)
    wide, high = size * rng.uniform(0.17, 0.26), size * rng.uniform(0.25, 0.34)
    sun = rng.uniform(0, 2 * math.pi)
    clothes = np.array(pick(rng, palette_of(rng)), dtype=np.float64)
    _ball(canvas, rng, (x, y + high * 2.35), (wide * 2.3, high * 1.35), clothes, sun)
    _ball(canvas, rng, (x, y + high * 0.95), (wide * 0.5, high * 0.6), skin * 0.85, sun)
    _strands(canvas, rng, (x, y - 0.25 * high), (wide * 1.25, high * 1.05), hair, behind=True)
    _ball(canvas, rng, (x, y), (wide, high), skin, sun)
    for side in (-1, 1):
        _eye(canvas, rng, x + side * wide * 0.42, y - high * 0.08, wide * rng.uniform(0.17, 0.22), hair)
    draw = ImageDraw.Draw(canvas)
    shade = tuple(int(value) for value in skin * 0.72)
    nose = curve(
        np.array([x, y]), np.array([x + wide * 0.18, y + high * 0.25]), np.array([x - wide * 0.08, y + high * 0.28])
    )
    draw.line(nose, fill=shade, width=max(2, int(wide * 0.05)), joint="curve")
    lips = np.array(hsv(rng, (0.95, 1.0), (0.35, 0.7), (0.45, 0.85)), dtype=np.float64)
    _ball(canvas, rng, (x, y + high * 0.5), (wide * rng.uniform(0.28, 0.4), high * 0.07), lips, sun)
    _strands(canvas, rng, (x, y - 0.25 * high), (wide * 1.15, high * 0.95), hair, behind=False)
    return canvas, "a portrait of a person"


def _ball(
    canvas: Image.Image,
    rng: np.random.Generator,
    centre: tuple[float, float],
    radii: tuple[float, float],
    colour: NDArray[np.float64],
    sun: float,
) -> None:
    """Paint an ellipse that is shaded as a ball under soft light, with the grain of skin."""
    left, top = int(centre[0] - radii[0]), int(centre[1] - radii[1])
    width, height = max(2, int(2 * radii[0])), max(2, int(2 * radii[1]))
    u, v = np.linspace(-1, 1, width)[None, :], np.linspace(-1, 1, height)[:, None]
    inside = u**2 + v**2
    depth = np.sqrt(np.clip(1 - inside, 0, 1))
    lit = 0.55 + 0.3 * depth + 0.28 * (u * math.cos(sun) + v * math.sin(sun))
    grain = 1 + 0.02 * field(rng, width, height, (0.4, 1.4))
    patch = (colour * (lit * grain)[:, :, None]).clip(0, 255).astype(np.uint8)
    edge = np.clip((1 - inside) * min(width, height) / 6, 0, 1)
    canvas.paste(Image.fromarray(patch), (left, top), Image.fromarray((edge * 255).astype(np.uint8)))


def _eye(canvas: Image.Image, rng: np.random.Generator, x: float, y: float, radius: float, hair: Colour) -> None:
    draw = ImageDraw.Draw(canvas)
    white = hsv(rng, (0.0, 1.0), (0.0, 0.06), (0.8, 0.98))
    draw.ellipse((x - radius, y - radius * 0.5, x + radius, y + radius * 0.5), fill=white)
    for share, colour in ((0.5, hsv(rng, (0.05, 0.6), (0.2, 0.7), (0.2, 0.6))), (0.22, (12, 10, 10))):
        draw.ellipse((x - radius * share, y - radius * share, x + radius * share, y + radius * share), fill=colour)
    spark = radius * 0.1
    draw.ellipse((x - 2.5 * spark, y - 2.5 * spark, x - 0.5 * spark, y - 0.5 * spark), fill=(250, 250, 250))
    lid = curve(np.array([x - radius, y]), np.array([x, y - radius * 1.1]), np.array([x + radius, y]))
    draw.line(lid, fill=(40, 25, 20), width=max(1, int(radius * 0.12)))
    brow = [(px, py - radius * 0.65) for px, py in lid]
    draw.line(brow, fill=hair, width=max(1, int(radius * rng.uniform(0.12, 0.3))))


def _strands(
    canvas: Image.Image,
    rng: np.random.Generator,
    centre: tuple[float, float],
    radii: tuple[float, float],
    colour: Colour,
    *,
    behind: bool,
) -> None:
    draw = ImageDraw.Draw(canvas)
    long = rng.uniform(0.3, 1.6)
    crown = np.array([centre[0], centre[1] - radii[1] * 0.75])
    for angle in np.sort(rng.uniform(0, math.pi, 500 if behind else 260)):
        side = np.array([math.cos(angle), -math.sin(angle)])
        bend = np.array(centre) + side * np.array(radii) * rng.uniform(0.85, 1.12)
        if not behind:
            bend[1] = min(bend[1], centre[1] - radii[1] * 0.35)
        fall = (long if behind else 0.15) * radii[1] * rng.uniform(0.5, 1.1)
        end = bend + np.array([side[0] * radii[0] * 0.12 + rng.normal(0, 0.05) * radii[0], fall])
        bright = float(np.clip(rng.normal(1.0, 0.3), 0.3, 1.9))
        fill = tuple(int(min(255, value * bright)) for value in colour)
        draw.line(curve(crown + rng.normal(0, 0.04, 2) * radii[0], bend, end), fill=fill, width=int(rng.integers(1, 4)))
