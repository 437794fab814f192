"""CLIP itself, in torch: tensors only; no files, no pictures, no printing."""
