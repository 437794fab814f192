"""From bytes on the disk to a model: foreign layouts end at this door."""
