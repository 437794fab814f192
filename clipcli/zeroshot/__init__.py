"""From words to weights: labels, templates, prompts, classifier."""
