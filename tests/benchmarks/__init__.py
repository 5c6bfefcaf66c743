"""What it costs, beside PEFT and beside the floor: `python -m tests.benchmarks --quick`, from the repository's root."""
