"""Banks: named adapters of any kind, one for each sample of a batch."""
