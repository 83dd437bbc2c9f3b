"""Inference over many images: `pipeline(task, model=...)` in Python, and what the commands of `lavis-lite` share."""
