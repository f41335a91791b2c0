"""Effects and invariances."""
