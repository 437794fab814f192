"""Training: pairs of pictures and words in, a model directory out (paper, section 2)."""
