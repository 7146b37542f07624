"""Puts the stand-in into every process of Python that has this folder, `tests` and the project on its path."""

from gpu_stand_in.install import install

install()
