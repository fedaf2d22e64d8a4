"""A batch as verl takes it: rows and columns of what was sampled, proofs on it, and its metrics."""
