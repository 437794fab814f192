"""Zero-shot image classification at the command line, with CLIP."""

__version__ = "0.1.0"
