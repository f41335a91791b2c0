"""Reinforcement learning with linear structure."""
