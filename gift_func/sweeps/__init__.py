"""Sweeps: many trials trained as one run."""
