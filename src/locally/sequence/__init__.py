"""Language and sequence models."""
