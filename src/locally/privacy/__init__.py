"""Differential privacy, local and central."""
