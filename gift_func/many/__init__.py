"""Many adapters on one base: ensembles, banks, stores and sweeps."""
