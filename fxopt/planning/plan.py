"""`fxopt.plan`: what a training step takes under each policy, how much fits, and which policy to take."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from rich.console import RenderableType
from torch import nn
from transformers import PretrainedConfig

from fxopt.atomic_file import write_text
from fxopt.error_lines import in_a_line
from fxopt.inspection.configurations import check_batch, check_sizes, sequence_for
from fxopt.inspection.fake_models import fake_model, source_of
from fxopt.inspection.numbers import bytes_of, in_bytes, in_count
from fxopt.kernels.adamw import workspace_bytes
from fxopt.planning.simulate import Moment, Simulation, Step, graph_key, optimizer_bytes
from fxopt.precision.policy import Policy
from fxopt.precision.presets import choose, computes_bfloat16, device_memory, resolve
from fxopt.printing import as_text

Accuracy = Literal["critical", "normal", "tolerant"]
POLICIES = ("fp32", "mixed", "bf16", "bf16-islands", "bf16-8bit", "int8")
MOST_ROWS = 1 << 16
MOST_TRIALS = 24
# The first that fits is recommended; where none does, the first of the others: by loss as README measures it, and of
# equal ones the smaller first.
OTHERS = ("bf16-islands", "bf16", "bf16-8bit", "int8", "fp32", "mixed-stochastic", "fp8", "mixed")
PREFERRED: dict[Accuracy, tuple[str, ...]] = {
    "critical": ("fp32", "bf16-islands", "bf16"),
    "normal": ("bf16-islands", "bf16", "bf16-8bit", "int8"),
    "tolerant": ("bf16-8bit", "int8", "bf16-islands", "bf16"),
}


@dataclass(frozen=True)
class Row:
    """A training step under a policy: bytes on each device at the moment that takes most, and what runs then.

    `gathered` is what sharded training holds of other devices' parameters. `batch_size` is in rows on each device; 0
    if not even one fits: the bytes are then those of one.
    """

    policy: str
    checkpointing: bool
    release_gradients: bool
    batch_size: int
    weights: int
    optimizer: int
    gradients: int
    activations: int
    workspace: int
    gathered: int
    place: str

    @property
    def peak(self) -> int:
        return sum(getattr(self, part) for part in PARTS)

    def fits(self, memory: int) -> bool:
        """Whether as much as one row fits into so many bytes."""
        return self.batch_size > 0 and self.peak <= memory


PARTS = ("weights", "optimizer", "gradients", "activations", "workspace", "gathered")


@dataclass(frozen=True)
class Plan:
    """Memory of a training step under several policies, and which of them to take. All sizes are bytes."""

    model: str
    num_parameters: int
    sequence_length: int
    num_devices: int
    memory: int
    is_largest: bool  # whether each batch size is the largest that fits into `memory`
    rows: tuple[Row, ...]
    recommended: Row | None
    why: str
    notes: tuple[str, ...] = ()
    num_micro_batches: int = 1

    def __rich__(self) -> RenderableType:
        from fxopt.planning.render import as_table

        return as_table(self)

    def __str__(self) -> str:
        return as_text(self) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the plan to a file: .html (a page that opens from disk), .json or .txt; ValueError for others."""
        from fxopt.planning.render import as_html, as_json

        path = Path(path)
        writers: dict[str, Callable[[Plan], str]] = {".html": as_html, ".json": as_json, ".txt": str}
        if path.suffix not in writers:
            raise ValueError(f"{path}: a plan is written as {', '.join(writers)}")
        return write_text(path, writers[path.suffix](self))


def plan(
    model: nn.Module | PretrainedConfig | str | Path,
    policies: str | Policy | Sequence[str | Policy] = POLICIES,
    *,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    memory: int | str | None = None,
    num_devices: int = 1,
    num_micro_batches: int = 1,
    accuracy: Accuracy = "normal",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Plan:
    """What a training step of `model` takes under each of `policies`, without running one.

    A step is simulated on fake tensors (`fxopt.planning.simulate`), with activations kept and computed again, and with
    gradients kept and released. Its peak is that of every step but the first, which has no optimizer states yet.

    Args:
        model: a configuration, or the name of one as in `fxopt.inspect`, whose parameters are all trained; or a model,
            planned with its adapters and with what is frozen in it. Its own tensors are not touched.
        policies: presets' names or policies, or one of them.
        batch_size: rows on each device. None: the largest that fits into `memory`, or 1 if that is not given either.
        sequence_length: tokens in each row; 2048, or the most that the model takes.
        memory: of one device, in bytes, or as in "24GB". None: of this machine's.
        num_devices: shard weights, gradients and optimizer states over so many (FSDP).
        num_micro_batches: backward passes in a step, each of `batch_size` rows. From two on, all gradients are there
            throughout the step, released ones too until the last pass, and beside each bfloat16 gradient lie two bytes
            of what its sum has not room for (none where gradients are sharded).
        accuracy: how much depends on the last digit of the loss: "critical", "normal" or "tolerant". It decides which
            policies are recommended first.
        on_progress: called before each simulation with what it is of, its number, and how many there are.

    Raises:
        ValueError: sizes that cannot be, a sequence that is too long, no such model (`UnknownModelError`).
        PolicyError: a policy is unknown, or does not fit.
    """
    if isinstance(memory, str):
        memory = bytes_of(memory)
    policies = [policies] if isinstance(policies, str | Policy) else policies
    if not policies:
        raise ValueError("policies is empty; it takes presets' names or policies")
    check_sizes(batch_size=batch_size, num_devices=num_devices, num_micro_batches=num_micro_batches, memory=memory)
    if accuracy not in get_args(Accuracy):
        raise ValueError(f"unknown accuracy {accuracy!r}; known: {', '.join(get_args(Accuracy))}")
    source, config = source_of(model)
    sequence_length = sequence_for(config, sequence_length)
    check_batch(batch_size or 1, sequence_length)
    like, _ = fake_model(source, "bf16")
    num_parameters = sum(parameter.numel() for parameter in like.parameters())
    budget = device_memory() if memory is None else memory
    asked = (choose(like, memory=budget)[0] if policy == "auto" else resolve(policy) for policy in policies)
    resolved = list(dict.fromkeys(asked))
    limit = budget if batch_size is None and memory is not None else None
    planner = _Planner(source, sequence_length, num_devices, batch_size or 1, limit, num_micro_batches > 1)
    rows: list[Row] = []
    jobs = [(policy, checkpointing) for policy in resolved for checkpointing in (False, True)]
    for number, (policy, checkpointing) in enumerate(jobs):
        if on_progress is not None:
            on_progress(policy.name + ", activations computed again" * checkpointing, number, len(jobs))
        rows += planner.rows(policy, checkpointing)
    notes = [*_frozen(like), *_too_large(rows), *(_of_the_limit(rows) if limit is not None else ()), *planner.notes]
    recommended, why = recommend(rows, num_parameters, budget, accuracy, num_devices)
    return Plan(
        model=type(like).__name__,
        num_parameters=num_parameters,
        sequence_length=sequence_length,
        num_devices=num_devices,
        memory=budget,
        is_largest=limit is not None,
        rows=tuple(rows),
        recommended=recommended,
        why=why,
        notes=tuple(dict.fromkeys(notes)),
        num_micro_batches=num_micro_batches,
    )


def _of_the_limit(rows: Sequence[Row]) -> Iterator[str]:
    """What is to be known of the most rows that fit."""
    yield (
        "a process takes more than is counted here, by 6 to 21 % in the runs of README: plan with less memory than "
        "the device has"
    )
    if any(row.batch_size == MOST_ROWS for row in rows):
        yield f"where {MOST_ROWS} rows fit, more may: no larger batch is tried"


def _too_large(rows: Sequence[Row]) -> Iterator[str]:
    if any(row.batch_size == 0 for row in rows):
        yield "where rows are 0 not even one fits: the bytes are those of one"


def _frozen(model: nn.Module) -> list[str]:
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return [f"{in_count(frozen)} parameters of this model are frozen"] if frozen else []


class _Planner:
    def __init__(
        self,
        source: PretrainedConfig | nn.Module,
        sequence_length: int,
        num_devices: int,
        batch_size: int,
        limit: int | None,
        accumulates: bool = False,
    ):
        self.source, self.sequence_length, self.num_devices = source, sequence_length, num_devices
        self.batch_size, self.limit, self.accumulates = batch_size, limit, accumulates
        self.notes: list[str] = []
        self._simulations: dict[Hashable, Simulation] = {}  # policies that differ in their states alone share one
        self._states: dict[Policy, int] = {}

    def rows(self, policy: Policy, checkpointing: bool) -> Iterator[Row]:
        name = policy.name + " with checkpointing" * checkpointing
        try:
            simulation = self._simulation(policy, checkpointing)
            if policy not in self._states:
                self._states[policy] = optimizer_bytes(self.source, policy)
            for release in (False, True):
                yield self._row(simulation, policy, checkpointing, release)
            found = simulation.forward.report
            self.notes += [f"{name}: the graph breaks: {reason}" for reason in found.graph_breaks]
            self.notes += [f"{name}: the original forward runs: {reason}" for reason in found.fallbacks]
        except Exception as error:  # what models' code does with values, which fake tensors have not, raises anything
            self.notes.append(f"{name} cannot be simulated (it may still train): {in_a_line(error, with_place=True)}")

    def _simulation(self, policy: Policy, checkpointing: bool) -> Simulation:
        key = graph_key(policy), checkpointing
        if key not in self._simulations:
            self._simulations[key] = Simulation(self.source, policy, checkpointing, self.num_devices)
        return self._simulations[key]

    def _row(self, simulation: Simulation, policy: Policy, checkpointing: bool, release: bool) -> Row:
        blank = Row(policy.name, checkpointing, release, 1, 0, 0, 0, 0, 0, 0, "")
        share = self.num_devices
        gathered = gathered_bytes(simulation) if share > 1 else 0

        def row(batch_size: int) -> Row:
            step = simulation.step(batch_size, self.sequence_length, self.accumulates)
            if step.summed is not None:
                moments = self._while_summing(step, step.summed, policy, release, gathered)
            elif release:  # one gradient is used up while the activations before it are still there
                workspace = _update_workspace(step.largest_gradient, policy)
                moments = [(step.released, gathered), (replace(step.at_update, workspace=workspace), gathered)]
            else:
                workspace = _update_workspace(-(-step.gradients // share), policy)
                moments = [(step.kept, gathered), (Moment(0, step.gradients, workspace, "the optimizer's step"), 0)]
            at_each = [
                replace(
                    blank,
                    batch_size=batch_size,
                    weights=-(-step.weights // share),
                    optimizer=-(-self._states[policy] // share),
                    gradients=-(-moment.gradients // share),
                    activations=moment.activations,
                    workspace=moment.workspace,
                    gathered=gathered_then,
                    place=moment.place,
                )
                for moment, gathered_then in moments
            ]
            return max(at_each, key=lambda row: row.peak)

        if self.limit is None:
            return row(self.batch_size)
        largest = largest_batch(lambda batch_size: row(batch_size).peak, self.limit)
        return row(largest) if largest else replace(row(1), batch_size=0)

    def _while_summing(
        self, step: Step, summed: Moment, policy: Policy, release: bool, gathered: int
    ) -> list[tuple[Moment, int]]:
        """The moments of a step of several backward passes that may take most, and what is gathered then."""
        gradients = step.gradients + (step.residuals if self.num_devices == 1 else 0)
        used_at_once = step.largest_gradient if release else -(-step.gradients // self.num_devices)
        workspace = _update_workspace(used_at_once, policy)
        if release:  # the first gradient of the last pass is used up while all the others are there
            last = replace(step.at_update, gradients=gradients, workspace=workspace), gathered
        else:
            last = Moment(0, gradients, workspace, "the optimizer's step"), 0
        return [(replace(summed, gradients=gradients), gathered), last]


def _update_workspace(gradients: int, policy: Policy) -> int:
    """What the optimizer's step takes beside so many bytes of gradients."""
    precision = policy.default
    num_states = 0 if precision.optimizer_state == "float32" else 2
    if precision.storage == torch.float32 and not num_states:
        return 0
    numel = gradients // precision.gradient.itemsize
    return workspace_bytes(numel, stochastic=precision.rounding == "stochastic", num_states=num_states)


def largest_batch(peak_of: Callable[[int], int], limit: int) -> int:
    """The largest batch whose peak is within `limit`, 0 if not even one row's is.

    The peak grows with the batch, nearly in proportion, so that the line through two of them leads close to the answer.
    """
    fits, too_large = 0, MOST_ROWS + 1
    known: dict[int, int] = {}
    guess = 2
    for _ in range(MOST_TRIALS):
        known[guess] = peak_of(guess)
        if known[guess] <= limit:
            fits = guess
        else:
            too_large = guess
        if too_large - fits == 1:
            break
        guess = 2 * guess
        if len(known) > MOST_TRIALS // 2:
            guess = (fits + too_large) // 2  # a peak that is not straight enough for lines
        elif len(known) > 1:
            (b1, p1), (b2, p2) = sorted(known.items())[-2:]
            guess = b1 + (limit - p1) * (b2 - b1) // max(p2 - p1, 1)
        guess = min(max(guess, fits + 1), too_large - 1)
    return fits


def gathered_bytes(simulation: Simulation) -> int:
    """What FSDP holds whole beside its shards: weights of two blocks, the gradient of one, and what is in no block."""
    model = simulation.model
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    blocks = list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=()))
    size = simulation.policy.default.activation.itemsize
    largest = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    outside = sum(p.numel() for p in model.parameters()) - inside
    return size * (3 * largest + outside)


def recommend(
    rows: Sequence[Row], num_parameters: int, memory: int, accuracy: Accuracy, num_devices: int = 1
) -> tuple[Row | None, str]:
    """The row to take, and why, in two sentences.

    By accuracy first: a step that is computed twice, or whose gradients are used up inside backward, is as accurate.
    Then by time: activations are computed again only where nothing else fits.
    """
    if not rows:
        return None, "No policy could be simulated. The notes say why."
    order = list(PREFERRED[accuracy])
    has_bfloat16 = not torch.cuda.is_available() or computes_bfloat16(torch.device("cuda"))
    if not has_bfloat16:
        order = ["fp32"]
    order += [policy for policy in (*OTHERS, *(row.policy for row in rows)) if policy not in order]
    ranked = sorted(rows, key=lambda row: (order.index(row.policy), row.checkpointing, row.release_gradients))
    fitting = [row for row in ranked if row.fits(memory)]
    size, room = f"{in_count(num_parameters)} parameters", in_bytes(memory)
    if not fitting:
        smallest = min(rows, key=lambda row: row.peak)
        return None, (
            f"None of these fits {size} into {room}. The smallest is {_described(smallest)}, with "
            f"{in_bytes(smallest.peak)}: take {_what_takes_less(rows)}."
        )
    best = fitting[0]
    passed = [policy for policy in order[: order.index(best.policy)] if any(row.policy == policy for row in rows)]
    need = f"{in_bytes(best.peak)} of {room} at {in_rows(best.batch_size)}{' on each device' * (num_devices > 1)}"
    if not has_bfloat16:
        first = f"This GPU has no bfloat16 arithmetic, so {_described(best)} is the one to take: {need}."
    elif passed:
        do = "do" if len(passed) > 1 else "does"
        first = (
            f"Where accuracy is {accuracy}, {' and '.join(passed)} would come first and {do} not fit {size} into "
            f"{room}, so {_described(best)} is the one to take: {need}."
        )
    else:
        first = f"Where accuracy is {accuracy}, {_described(best)} is the one to take for {size}: {need}."
    return (
        best,
        f"{first} {_WHAT_IT_IS.get(best.policy, 'It is none of the presets that are known for their accuracy.')}",
    )


def in_rows(batch_size: int) -> str:
    return f"{batch_size} row{'s' * (batch_size != 1)}"


def _what_takes_less(rows: Sequence[Row]) -> str:
    smaller = [policy for policy in ("bf16-8bit", "int8") if not any(row.policy == policy for row in rows)]
    fewer = ["fewer rows"] if any(row.batch_size > 1 for row in rows) else []
    ways = [*smaller, *fewer, "shorter rows", "more devices", "adapters (PEFT) on a frozen model"]
    return f"{', '.join(ways[:-1])}, or {ways[-1]}"


def _described(row: Row) -> str:
    more = [text for text, is_so in (("activations computed again", row.checkpointing),
                                     ("gradients released", row.release_gradients)) if is_so]  # fmt: skip
    return row.policy + (f" with {' and '.join(more)}" if more else "")


_WHAT_IT_IS = {
    "fp32": "It is float32 training itself: no update and no activation is rounded to two bytes.",
    "mixed-stochastic": "Its weights take four bytes and are cast to two stochastically, which hides no update.",
    "fp8": "Its products are in float8: compare its loss with bf16's in a short run before a long one.",
    "mixed": "Its weights take four bytes and are cast to two by nearest rounding, which hides the smallest updates.",
    "bf16-islands": "Its weights take two bytes, its norms four, and stochastic rounding loses no update.",
    "bf16": "Its weights take two bytes, and stochastic rounding loses no update.",
    "bf16-8bit": "Its weights take two bytes, its norms four, and its optimizer states one byte each.",
    "int8": "Its matrices take one byte: compare its loss with bf16's in a short run before a long one.",
}
