"""From path to path: what the notebooks call."""
