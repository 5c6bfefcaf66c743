"""Ensembles: adapters of one kind, stacked, run and trained as one."""
