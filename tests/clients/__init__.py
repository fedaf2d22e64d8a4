"""Clients of other languages: their own tests, the shared vectors, an agent trained through them."""
