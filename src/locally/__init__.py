"""Locally: daily papers that run. Methods for local and linear learning, each with its claim as an experiment."""

__version__ = "0.1.0"
