"""The reference interpreter: what every op means, in NumPy."""
