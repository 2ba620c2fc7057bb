"""The library, without Ray: prunes a causal language model with calibration text that the model wrote itself."""

__version__ = "0.1.0"
