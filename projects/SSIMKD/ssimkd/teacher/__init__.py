"""A frozen detector that teaches."""
