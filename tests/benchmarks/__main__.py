"""The command: `python -m tests.benchmarks --help`."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
import warnings
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model is at hand
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts bytes here and would print a banner

import torch

from . import device, pages
from .measure import FULL, QUICK, Result, measure
from .report import bound, caption, found, machine, table, write_json
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
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="draw it; the growth over the number of adapters goes to FILE-growth.png"
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="rows of another table, on this device: Llamas of 135M to 8B random weights, bfloat16 and CUDA events on cuda; "
        "with --quick a tiny one",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="put the table of a full run into tests/benchmarks/RESULTS.md, and the rows that decide into README.md; with "
        "--device, the tables of all files in tests/benchmarks/results/",
    )
    options = parser.parse_args()
    if options.write and (not options.full or options.only):
        parser.error("--write takes the figures that count, all those of --full")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    scale = replace(FULL if options.full else QUICK, device=options.device or "cpu")
    table_of_rows = device.rows(options.device, scale.full) if options.device else ROWS
    chosen = [name for name in table_of_rows if scale.full or name not in FULL_ONLY]
    for pattern in options.only or ():
        if not any(meant(name, pattern) for name in chosen):
            parser.error(f"--only {pattern!r} names no row of this run; there are {', '.join(chosen)}")
    if options.only:
        chosen = [name for name in chosen if any(meant(name, pattern) for pattern in options.only)]
    if scale.threads is not None:
        torch.set_num_threads(scale.threads)
    warnings.filterwarnings("ignore", module=r"peft\.")
    host, start = machine(options.device), time.perf_counter()
    results: list[Result] = []
    failed: list[str] = []
    spent: dict[str, float] = {}
    for name in chosen:
        if sys.stderr.isatty():
            print(f"\r{name:<40}\r", end="", file=sys.stderr, flush=True)
        began = time.perf_counter()
        try:
            results.append(measure(name, table_of_rows[name](scale), scale))
        except Exception as error:  # the other rows are still worth having
            failed.append(f"{name}: {type(error).__name__}: {error}")
            if not isinstance(error, AssertionError):
                failed.append(traceback.format_exc(limit=-4))
        gc.collect()
        spent[name] = round(time.perf_counter() - began, 1)
    host["load after"] = machine(options.device)["load"]
    host["seconds"] = round(time.perf_counter() - start)
    print(table(results))
    under = caption("full" if scale.full else "quick", host)
    print(f"\n{under}")
    judged = [(row, key) for row in results if row.judged for key in row.targets]
    missed = [f"  {row.name}: {key} {bound(row, key)}, found {found(row, key)}" for row, key in judged if not row.met(key)]
    if judged:
        print("\n".join([f"{len(judged) - len(missed)} of {len(judged)} targets met{'; missed:' if missed else '.'}", *missed]))
    if options.json:
        about = {"mode": "full" if scale.full else "quick", "date": time.strftime("%Y-%m-%d"), "machine": host, "spent": spent}
        write_json(options.json, results, about)
    if options.png and results:
        from .picture import draw

        draw(options.png, results, under)
    if options.write and options.device:
        pages.write_devices()
    elif options.write and results:
        pages.write(results, under)
    if failed:
        raise SystemExit("\n".join(["Rows that failed:", *failed]))


def meant(name: str, pattern: str) -> bool:
    return fnmatch(name.lower(), pattern.lower()) or fnmatch(name.split("/")[0].lower(), pattern.lower())


if __name__ == "__main__":
    main()
