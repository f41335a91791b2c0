"""What a reader sees, and what keeps it."""

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")  # addresses that only this machine reaches
