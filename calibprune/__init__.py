"""Prune a causal language model with calibration text that it wrote itself: the library, free of Ray."""

__version__ = "0.1.0"
