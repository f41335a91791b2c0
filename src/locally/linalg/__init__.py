"""The ground floor: matrix-free, compiled and batched linear algebra."""
