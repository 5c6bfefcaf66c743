"""The command: `python -m tests.benchmarks --help`."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from fnmatch import fnmatch
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model is at hand

import torch

from .measure import FULL, QUICK, Result, measure
from .report import machine, table, write_json
from .table import FULL_ONLY, ROWS


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.benchmarks", description="Costs, beside PEFT's and beside the floor.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a smoke test in under a minute: equal outputs (the default)")
    size.add_argument(
        "--full", action="store_true", help="the figures that count; minutes, on a machine that does nothing else"
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="a family, 'step', or a row, 'step/LoRA'; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, with the machine's name")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it")
    options = parser.parse_args()
    scale = FULL if options.full else QUICK
    chosen = [name for name in ROWS if scale.full or name not in FULL_ONLY]
    for pattern in options.only or ():
        if not any(meant(name, pattern) for name in chosen):
            parser.error(f"--only {pattern!r} names no row of this run; there are {', '.join(chosen)}")
    if options.only:
        chosen = [name for name in chosen if any(meant(name, pattern) for pattern in options.only)]
    if scale.threads is not None:
        torch.set_num_threads(scale.threads)
    warnings.filterwarnings("ignore", module=r"peft\.")
    host = machine()
    results: list[Result] = []
    for name in chosen:
        if sys.stderr.isatty():
            print(f"\r{name:<40}\r", end="", file=sys.stderr, flush=True)
        try:
            results.append(measure(name, ROWS[name](scale), scale))
        except AssertionError as error:
            raise SystemExit(f"{name}: {error}") from None
    mode = "full" if scale.full else "quick"
    host["load after"] = machine()["load"]
    print(table(results))
    under = (
        f"{mode} run on {host['processor']}, {host['cpus']} cpus, {host['threads']} threads, torch {host['torch']}, "
        f"peft {host['peft']}; load {host['load'][0]} before, {host['load after'][0]} after"
    )
    print(f"\nMedians of runs in turns; ratios with quartiles. {under[0].upper()}{under[1:]}.")
    if options.json:
        write_json(options.json, results, {"mode": mode, "date": time.strftime("%Y-%m-%d"), "machine": host})
    if options.png:
        from .picture import draw

        draw(options.png, results, under)


def meant(name: str, pattern: str) -> bool:
    return fnmatch(name.lower(), pattern.lower()) or fnmatch(name.split("/")[0].lower(), pattern.lower())


if __name__ == "__main__":
    main()
