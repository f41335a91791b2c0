"""Offline model-based design."""
