"""Local subspaces of data."""
