"""Every causal LM that transformers knows, tiny: what fxopt finds in it, and whether it still trains exactly.

Each model type of the registry is built from its configuration class and trained on a few batches, padded ones and one
of a single row among them: as it is, optimized, and in float64. A row says how many graphs were captured, how many of
its norms, gated activations, rotary embeddings and losses were rewritten, and how the errors of the loss and of all
gradients compare. A process per model: what crashes costs its row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file
    sys.path[0] = str(ROOT)

from packaging.version import Version
from rich.console import Console
from rich.table import Table

from benchmarks.progress_bar import progress_bar
from fxopt.atomic_file import write_text

# The ops that take the place of each kind of site.
OPS_OF = {
    "norm": ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"),
    "gated activation": ("glu", "clamped_swiglu"),
    "squared relu": ("relu_squared",),
    "rotary embedding": ("rope",),
    "loss": ("linear_cross_entropy",),
}
POLICIES = ("fp32", "bf16")
# What errors are taken over; as many others where one fails. The kinds of batch that are captured one by one.
BATCHES: tuple[dict[str, int], ...] = (*[{}] * 5, {"padding": 6}, {"padding": 11}, {"num_rows": 1})
NUM_BATCHES = len(BATCHES)
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    console = Console(stderr=options.json)
    from benchmarks.tiny_causal_lms import NAMES

    unknown = sorted(set(options.types) - set(NAMES))
    if unknown:
        console.print(f"unknown model type {unknown[0]!r}: it is not in transformers' causal-LM registry")
        return 2
    names = options.types or list(NAMES)
    versions = {name: version(name) for name in ("torch", "transformers")}
    setting = {"versions": versions, "device": options.device}
    rows = saved_rows(options.save, setting, names) if options.resume else []
    done = {row["type"] for row in rows}
    with progress_bar(console) as progress, ThreadPoolExecutor(options.jobs) as pool:
        task = progress.add_task("model types", total=len(names), completed=len(rows))
        left = [name for name in names if name not in done]
        for future in as_completed([pool.submit(cover_afresh, name, options.timeout, options.device) for name in left]):
            rows.append(row := future.result())
            if options.save:  # after each row: a run that is stopped has shown what it has found
                write_text(options.save, json.dumps({**setting, "rows": rows}, indent=2))
            progress.console.print(f"{row['type']}: {row['status']} in {row['seconds']:.0f} s", highlight=False)
            progress.advance(task)
    rows.sort(key=lambda row: names.index(row["type"]))
    run = {**setting, "rows": rows}
    if options.save:
        write_text(options.save, json.dumps(run, indent=2))
    if options.json:
        print(json.dumps(run, indent=2))
    else:
        console.print(table(rows))
        for line in reasons(rows):
            console.print(line, markup=False, highlight=False)
        console.print(" and ".join(f"{name} {number}" for name, number in versions.items()))
        console.print(summary(rows))
    if options.against:
        other = json.loads(options.against.read_text())
        console.print(f"what differs from {options.against}, a run with {other['versions']}:", highlight=False)
        for line in differences(other["rows"], rows):
            console.print(line, markup=False, highlight=False)
    return int(any(fails(row) for row in rows))


# Types whose errors are no fair comparison, why, and from which transformers on they are one.
UNFAIR = {
    "phimoe": ("its router draws experts at random, and bf16 draws others than float64", None),
    "doge": ("its eager forward attends to later tokens, and what Dynamo captures of it does not", "5.23"),
}


def fails(row: Row) -> bool:
    """Whether a row shows a fault of fxopt's: a crash, a call that fell back, a refused rewrite, a larger error."""
    runs = [row[policy] for policy in POLICIES if policy in row]
    faults = any(run["fallbacks"] or run["refused"] for run in runs)
    _, fair_from = UNFAIR.get(row["type"], ("", "0"))
    is_fair = fair_from is not None and Version(version("transformers")) >= Version(fair_from)
    inexact = is_fair and any(run["violations"] for run in runs)
    return row["status"] == "crashed" or faults or inexact


def saved_rows(path: Path, setting: dict[str, Any], names: list[str]) -> list[Row]:
    """The rows of an interrupted run of the same versions and device, but those of crashes, which are tried again."""
    if not path.exists():
        return []
    run = json.loads(path.read_text())
    was = {key: run.get(key) for key in setting}
    if was != setting:
        raise SystemExit(f"{path} is of {was}, this run of {setting}: give another file, or no --resume")
    return [row for row in run["rows"] if row["type"] in names and row["status"] != "crashed"]


def cover_afresh(model_type: str, timeout: float, device: str) -> Row:
    """`cover` in a process of its own."""
    # A server that has imported everything once forks the processes; not where they use a GPU, which it has opened.
    context: Any = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    context.set_forkserver_preload(["torch", "transformers", "fxopt.api", "benchmarks.tiny_causal_lms"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(model_type, send, timeout, device))
    began = time.perf_counter()
    process.start()
    send.close()
    try:
        row: Row = receive.recv()
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGALRM
        reason = f"took more than {timeout:.0f} s" if late else f"the process died (exit code {process.exitcode})"
        row = {"type": model_type, "status": "crashed", "reason": reason}
    process.join()
    return row | {"seconds": time.perf_counter() - began}


def _worker(model_type: str, send: Any, timeout: float, device: str) -> None:
    signal.alarm(int(timeout))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import torch

    torch.set_num_threads(1)
    try:
        row = cover(model_type, device)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {str(error)[:300]} ({Path(frame.filename).name}:{frame.lineno})"
        row = {"type": model_type, "status": "crashed", "reason": reason}
    send.send(row)


def cover(model_type: str, device: str = "cpu") -> Row:
    """Trains one tiny model plain, optimized and in float64; raises what fxopt or the comparison raises."""
    import fxopt
    from benchmarks.census import count_sites
    from benchmarks.tiny_causal_lms import batch_for, tiny_causal_lm

    def made() -> Any:
        model: Any = tiny_causal_lm(model_type)  # transformers' `to` is typed for another argument
        return model.to(device)

    def batch(seed: int) -> dict[str, Any]:
        tensors = batch_for(model, seed=seed, **BATCHES[seed % NUM_BATCHES])
        return {name: tensor.to(device) for name, tensor in tensors.items()} | {"use_cache": False}

    try:
        model = made()
        batches = [batch(seed) for seed in range(2 * NUM_BATCHES)]
        model(**batches[0]).loss.backward()
    except Exception as error:
        return {"type": model_type, "status": "outside", "reason": f"{type(error).__name__}: {str(error)[:200]}"}
    row: Row = {"type": model_type, "parameters": sum(p.numel() for p in model.parameters())}
    row["sites"] = dict(count_sites(model, lambda: model(**batches[0])))
    for policy in POLICIES:
        try:
            fxopt.restore(fxopt.optimize(made(), policy))(**batches[0]).loss.backward()
        except Exception as error:
            row["reason"] = f"outside in {policy}: {type(error).__name__}: {str(error)[:200]}"
            continue
        row[policy] = cover_policy(made(), policy, batches)
    return row | {"status": "trained"}


def cover_policy(model: Any, policy: str, batches: list[Any]) -> Row:
    import fxopt
    from benchmarks.census import count_ops

    optimized = fxopt.optimize(model, policy)
    verification = fxopt.verify(optimized, *batches[:NUM_BATCHES])
    # Of some ten thousand errors a few are larger by luck, because of one batch. They are not with other batches.
    failures = {comparison.name: comparison for comparison in verification.failures}
    if failures:
        again = {comparison.name for comparison in fxopt.verify(optimized, *batches[NUM_BATCHES:]).failures}
        failures = {name: comparison for name, comparison in failures.items() if name in again}
    ops = count_ops(lambda: optimized(**batches[0]))
    report = fxopt.report(optimized)
    compared = verification.comparisons
    return {
        "hits": {kind: sum(ops[op] for op in names) for kind, names in OPS_OF.items()},
        "rewrites": report.hits,
        "graphs": sum(graph.kind == 0 for graph in report.graphs),  # of the first batch
        "recompiles": report.recompiles,
        "fallbacks": dict(report.fallbacks),
        "uncovered": dict(report.uncovered),
        "graph_breaks": dict(report.graph_breaks),
        "near_misses": [f"{miss.rule} at {miss.source}: {miss.reason}" for miss in report.near_misses],
        "refused": [f"{item.rule} at {item.source}: {item.reason}" for item in report.refused],
        "relative_error": sum(c.optimized_error for c in compared) / len(compared),
        "original_relative_error": sum(c.original_error for c in compared) / len(compared),
        "worst": dataclasses.asdict(verification.worst[0]),
        "violations": [dataclasses.asdict(comparison) for comparison in failures.values()],
        "compared": len(compared),
    }


def table(rows: list[Row]) -> Table:
    shown = Table(title="rewritten / there, and mean relative error of loss and gradients: optimized ← original")
    shown.add_column("model type", no_wrap=True)
    for name in ("graphs", *OPS_OF, "fp32", "bf16"):
        shown.add_column(name, justify="right")
    for row in rows:
        found = row.get("bf16", row.get("fp32"))
        if found is None:
            shown.add_row(row["type"], *[""] * (len(OPS_OF) + 1), row["status"])
            continue
        counts = [f"{found['hits'][kind]}/{row['sites'].get(kind, 0)}" for kind in OPS_OF]
        errors = [
            f"{row[p]['relative_error']:.1e} ← {row[p]['original_relative_error']:.1e}" if p in row else ""
            for p in POLICIES
        ]
        shown.add_row(row["type"], str(found["graphs"]), *counts, *errors)
    return shown


def reasons(rows: list[Row]) -> list[str]:
    """What was not optimized and why, one line per reason and type."""
    lines = []
    for row in rows:
        if "reason" in row:
            lines.append(f"{row['type']}: {row['status']}: {row['reason']}")
        for policy in POLICIES:
            for key in ("fallbacks", "uncovered", "graph_breaks", "near_misses", "refused"):
                for reason, count in Counter(row.get(policy, {}).get(key, ())).items():
                    lines.append(f"{row['type']} {policy} {key}: {count}× {reason}")
            for c in row.get(policy, {}).get("violations", ()):
                was, is_now = c["original_error"], c["optimized_error"]
                lines.append(f"{row['type']} {policy} less accurate: {c['name']}: {is_now:.1e}, was {was:.1e}")
    return lines


def differences(before: list[Row], after: list[Row]) -> list[str]:
    """What another run found otherwise, a line for each type: its status, its graphs, its hits."""
    known = {row["type"]: row for row in before}
    lines = [f"{name}: not in the registry any more" for name in known.keys() - {row["type"] for row in after}]
    for row in after:
        other = known.get(row["type"], {"status": "not in the registry"})
        found = [f"{other['status']} → {row['status']}"] if other["status"] != row["status"] else []
        for policy in POLICIES:
            was, is_now = other.get(policy), row.get(policy)
            if was and is_now:
                pairs = {kind: (was["hits"][kind], is_now["hits"][kind]) for kind in OPS_OF}
                pairs |= {"graphs": (was["graphs"], is_now["graphs"])}
                pairs |= {"less accurate": (len(was["violations"]), len(is_now["violations"]))}
                found += [f"{policy} {name} {old} → {new}" for name, (old, new) in pairs.items() if old != new]
        if found:
            lines.append(f"{row['type']}: {', '.join(found)}")
    return lines


def summary(rows: list[Row]) -> str:
    trained = [row for row in rows if row["status"] == "trained"]
    shares = []
    for kind in OPS_OF:
        counts = [(row["sites"].get(kind, 0), row[p]["hits"][kind]) for row in trained for p in POLICIES if p in row]
        there, found = sum(sites for sites, _ in counts), sum(min(sites, hits) for sites, hits in counts)
        shares.append(f"{kind} {found}/{there} ({found / max(there, 1):.1%})")
    inside = sum(not row[p]["violations"] for row in trained for p in POLICIES if p in row)
    runs = sum(p in row for row in trained for p in POLICIES)
    fell_back = [row["type"] for row in trained if any(row[p]["fallbacks"] for p in POLICIES if p in row)]
    whole = sum(next(row[p]["graphs"] for p in POLICIES[::-1] if p in row) == 1 for row in trained)
    return (
        f"{len(trained)} of {len(rows)} types trained, {whole} in one graph, {len(fell_back)} without fxopt; "
        f"loss and all gradients inside the accuracy rule in {inside} of {runs} runs; rewritten: {', '.join(shares)}"
    )


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="coverage", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="model types; default: all of the registry")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--device", default="cpu", help="what to train on (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON to FILE too")
    parser.add_argument("--resume", action="store_true", help="go on with the run that --save's FILE holds a part of")
    parser.add_argument("--against", type=Path, metavar="FILE", help="say what differs from the run saved in FILE")
    options = parser.parse_args(arguments)
    if options.resume and not options.save:
        parser.error("--resume goes on with what --save FILE has written: name the file")
    return options


if __name__ == "__main__":
    sys.exit(main())
