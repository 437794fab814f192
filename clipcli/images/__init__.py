"""From paths to pixels. The only room that imports PIL."""
