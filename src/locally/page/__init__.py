"""What a reader sees, and what keeps it."""
