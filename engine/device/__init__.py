"""Buffers, streams, events and kernels of a GPU."""
