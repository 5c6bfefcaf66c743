"""Autograd functions that compute a whole layer in one pass."""
