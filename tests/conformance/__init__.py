"""The shared vectors, replayed by every language's client."""
