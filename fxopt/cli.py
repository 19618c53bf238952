"""The `fxopt` command. A subcommand is a function that adds its parser, and one that runs it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from fxopt.inspection.diff import GraphDiff
    from fxopt.precision.policy import Policy

FAILED, WRONG_USE, INTERRUPTED, NOBODY_READS = 1, 2, 130, 141  # exit codes; the last two as shells have them
FILE_WIDTH = 160


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out what other libraries log. What keeps a graph from being captured is part of what is printed.

    Whoever calls `main` from Python hears them again afterwards.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns 0; 1 where a --fail-if holds or fxopt does not work here; 2 where it cannot be run; 130 after Ctrl-C; 141
    where who reads the output stopped to, as `head` does.
    """
    parser = argparse.ArgumentParser(prog="fxopt", description="See before you train.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_inspect, _add_diff, _add_plan, _add_doctor):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return NOBODY_READS
    except (ValueError, OSError) as error:
        print(f"fxopt {options.command}: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print(f"fxopt {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="what fxopt does to a model's graph, without weights and without a GPU",
        description="Captures the model's graph on fake tensors and shows what each pass changes, what it saves, and "
        "what was left alone and why.",
    )
    _add_model(parser)
    parser.add_argument("--policy", default="bf16", help="a preset, or a policy's JSON or YAML file (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="ROWS", help="rows of the batch (%(default)s)")
    parser.add_argument("--eval", action="store_true", help="the loss of an evaluation instead of a training step")
    parser.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")
    parser.add_argument("--no-proofs", action="store_true", help="trust the rules; a little faster")
    for name, text in _INSPECTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="FILE", help=text)
    parser.set_defaults(run=_inspect)


_INSPECTIONS = {
    "html": "write a page that opens from disk",
    "json": "write everything, for `fxopt diff`",
    "graphml": "write the graphs for networkx, Gephi, yEd",
    "model_explorer": "write the graphs for Google's Model Explorer; FILE ends in .model-explorer.json",
}


@_quietly()
def _inspect(options: argparse.Namespace) -> int:
    _check_sizes(options, "batch", "seq")
    _check_files(options, *_INSPECTIONS)
    from fxopt.api import inspect
    from fxopt.printing import progress_bar

    policy = _policy(options.policy)  # before the model is looked for
    with progress_bar() as show:
        diff = inspect(
            options.model,
            policy,
            batch_size=options.batch,
            sequence_length=options.seq,
            training=not options.eval,
            checkpointing=options.checkpointing,
            prove=not options.no_proofs,
            on_progress=show,
        )
    _save_and_print(diff, options, *_INSPECTIONS)
    return 0 if diff.graphs else FAILED


def _policy(name: str) -> str | Policy:
    """A preset by name, or the policy in a file."""
    from fxopt.precision.policy import Policy

    if name.endswith((".json", ".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"there is no policy file {name}")
        return Policy.load(name)
    return name if name == "auto" else Policy.named(name)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model on the Hub, a folder, a config.json, or a model type")
    parser.add_argument("--seq", type=int, metavar="TOKENS", help="tokens in each row (2048, or the model's most)")


def _save_and_print(result: Any, options: argparse.Namespace, *names: str) -> None:
    """Write `result` to each file that was asked for, and then to the terminal, which may be closed."""
    paths = [_with_ending(path, name) for name in names if (path := getattr(options, name)) is not None]
    written = [result.save(path) for path in paths]
    _print(result)
    for path in written:
        print(f"wrote {path}")


def _check_files(options: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for a file that cannot be written, before the work that it is to hold."""
    for name in names:
        if (path := getattr(options, name)) is not None:
            file, option = Path(_with_ending(path, name)), "--" + name.replace("_", "-")
            if Path(path).is_dir() or file.is_dir():
                raise ValueError(f"{path} is a folder; {option} takes the name of a file")
            if Path(path).suffix in _ENDINGS.values() and not path.endswith(_ENDINGS[name]):
                raise ValueError(f"{option} writes a file that ends in {_ENDINGS[name]}, and {path} does not")
            if not file.parent.is_dir():
                raise ValueError(f"there is no folder {file.parent} to write {file.name} into; make it first")
            try:
                if file.exists():
                    with open(file, "ab"):
                        pass
                if file.is_file() or not file.exists():  # written beside its place first
                    with tempfile.TemporaryFile(dir=file.resolve().parent):
                        pass
            except OSError as error:
                raise ValueError(f"{file} cannot be written: {error.strerror}") from None


_ENDINGS = {"html": ".html", "json": ".json", "graphml": ".graphml", "model_explorer": ".model-explorer.json"}


def _with_ending(path: str, name: str) -> str:
    return path if path.endswith(_ENDINGS[name]) else path + _ENDINGS[name]


def _add_diff(commands: Any) -> None:
    parser = commands.add_parser(
        "diff",
        help="compare two inspections",
        description="Compares two files of `fxopt inspect MODEL --json FILE`: two policies, two versions of "
        "transformers, before and after a change to a rule.",
        epilog="Conditions: NAME < NUMBER on B's number, with <= > >= == != too and with units (20 GB); NAME > 5 %% on "
        "the change from A to B. Names are those of the first column.",
    )
    parser.add_argument("before", metavar="A.json")
    parser.add_argument("after", metavar="B.json")
    parser.add_argument(
        "--fail-if", action="append", default=[], metavar="CONDITION",
        help="exit with 1 if it holds, such as 'fusions < 61'; may be given several times",
    )  # fmt: skip
    parser.set_defaults(run=_diff)


def _diff(options: argparse.Namespace) -> int:
    from fxopt.inspection.compare import Comparison, Condition
    from fxopt.inspection.render_json import load

    conditions = [Condition.parse(text) for text in options.fail_if]
    before, after = load(options.before), load(options.after)
    holding = [condition for condition in conditions if condition.holds(before.metrics, after.metrics)]
    _print(Comparison(before, after))
    for condition in holding:
        print(f"fxopt diff: failed, since {condition.text} ({_values(condition.name, before, after)})", file=sys.stderr)
    return FAILED if holding else 0


def _values(name: str, before: GraphDiff, after: GraphDiff) -> str:
    from fxopt.inspection.compare import shown

    return f"A {shown(name, before.metrics.get(name, 0.0))}, B {shown(name, after.metrics.get(name, 0.0))}"


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a training step takes in memory under each policy, without a GPU and without a run",
        description="Simulates a training step on fake tensors under several policies, with activations kept and "
        "computed again, with gradients kept and released, and recommends one.",
    )
    _add_model(parser)
    parser.add_argument("--memory", metavar="24GB", help="of one device; without it, of this machine's")
    parser.add_argument("--batch", type=int, metavar="ROWS", help="on each device (1; with --memory the most that fit)")
    parser.add_argument("--policy", metavar="A,B", help="presets or policy files (the most common presets)")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="shard over N of them (%(default)s)")
    parser.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="batches of a step, their gradients summed (%(default)s)",
    )
    parser.add_argument("--accuracy", default="normal", help="critical, normal or tolerant (%(default)s)")
    parser.add_argument("--html", metavar="FILE", help="write a page with bars that opens from disk")
    parser.add_argument("--json", metavar="FILE", help="write everything")
    parser.set_defaults(run=_plan)


@_quietly()
def _plan(options: argparse.Namespace) -> int:
    _check_sizes(options, "batch", "seq", "devices", "accumulate")
    _check_files(options, "html", "json")
    from fxopt.planning.plan import POLICIES, plan
    from fxopt.printing import progress_bar

    policies = [_policy(name.strip()) for name in options.policy.split(",")] if options.policy else POLICIES
    with progress_bar() as show:
        found = plan(
            options.model,
            policies,
            batch_size=options.batch,
            sequence_length=options.seq,
            memory=options.memory,
            num_devices=options.devices,
            num_micro_batches=options.accumulate,
            accuracy=options.accuracy,
            on_progress=show,
        )
    _save_and_print(found, options, "html", "json")
    return 0 if found.recommended is not None else FAILED


def _check_sizes(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if (size := getattr(options, name)) is not None and size < 1:
            raise ValueError(f"--{name} is {size}; it takes a number from 1 on")


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what works on this machine, what is missing, and the command that mends it",
        description="Compares versions with the ranges that fxopt declares, describes the devices, and tries every "
        "preset and backend on one training step of a tiny model. Exits with 1 if training does not work with the "
        "default preset, or a version is outside its range.",
    )
    parser.add_argument("--device", metavar="DEVICE", help="what to train on, such as cpu or cuda:1 (the accelerator)")
    parser.add_argument("--json", metavar="FILE", help="write what was found")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from fxopt.diagnosis.doctor import doctor

    _check_files(options, "json")
    diagnosis = doctor(options.device, progress=sys.stderr.isatty())
    _save_and_print(diagnosis, options, "json")
    return 0 if diagnosis.works else FAILED


def _print(what: Any) -> None:
    """To the terminal as wide as it is; to a file or a pipe as wide as needed."""
    _Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(what, crop=False)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would leave the program with 1, which says that something failed


if __name__ == "__main__":
    sys.exit(main())
