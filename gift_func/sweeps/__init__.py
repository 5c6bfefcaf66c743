"""Sweeps: trials of many hyper-parameters, trained as one run."""
