"""Noise schedules, guidance, samplers as tables, noise and tiles. Pure NumPy."""
