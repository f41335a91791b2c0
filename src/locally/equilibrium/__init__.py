"""Games and monotone inclusions."""
