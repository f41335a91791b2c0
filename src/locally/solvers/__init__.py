"""Linear systems and fixed points."""
