"""Training without one global backward pass, or without trust."""
