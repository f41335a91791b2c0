"""Schema versions of the store, oldest first; alembic applies those that a database lacks."""
