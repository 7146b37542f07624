"""Serving with NVIDIA's Triton Inference Server: a client of `engine`, like the command line."""
