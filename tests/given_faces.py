"""A face detector that is told what to find: for networks that are random, and make no faces."""

from engine.image.faces import Box, Face


class GivenFaces:
    """Finds given boxes of a photo on its stage 1; `size` is the photo's (width, height)."""

    name = "given boxes"

    def __init__(self, *boxes, size):
        self.boxes, self.size = boxes, size

    def find(self, rgb):
        new_size = rgb.shape[1], rgb.shape[0]
        return [Face(Box(*box).scaled(self.size, new_size), 0.9) for box in self.boxes]
