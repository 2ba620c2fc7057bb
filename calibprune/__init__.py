"""Prune a causal language model with calibration text that it wrote itself: the library, free of Ray."""

from calibprune.process import keep_compiled_code_private

__version__ = "0.1.0"

keep_compiled_code_private()
