"""Gradients of many backward passes: their sum is as accurate as one batch's gradient, in every loop, for two bytes."""

import copy
import gc
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import fxopt
from fxopt.precision.accumulation import residual_of
from fxopt.precision.annotate import annotate
from fxopt.precision.optimizer import Optimizer, optimizer

NUM = 128  # micro-batches, of a row each
BOUND = 1.2


class Gradients:
    """What an optimizer's updates find, one parameter after the other."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen = model, dict[Tensor, Tensor]()

    def before_update(self, parameters: Any) -> None:
        assert not self.seen.keys() & set(parameters)
        self.seen |= {parameter: parameter.grad.clone() for parameter in parameters}

    def after_update(self, parameters: Any) -> None: ...

    @property
    def found(self) -> Tensor:
        return in_one([self.seen[parameter] for parameter in self.model.parameters() if parameter.requires_grad])


def in_one(gradients: Any) -> Tensor:
    """All of them as one vector, float64 (n,)."""
    return torch.cat([gradient.double().flatten() for gradient in gradients])


@pytest.fixture
def rows() -> Tensor:
    return torch.randint(0, 96, (NUM, 12), generator=torch.Generator().manual_seed(2))


def observed(model: nn.Module, **options: Any) -> tuple[Optimizer, Gradients]:
    opt, gradients = optimizer(model, lr=1e-3, **options), Gradients(model)
    opt.register_update_observer(gradients)
    return opt, gradients


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def allowed(model: nn.Module, rows: Tensor) -> tuple[Tensor, float]:
    """The exact gradient of a batch of these rows, and the error of the model's own, times the bound."""
    exact = copy.deepcopy(model).double()
    found = []
    for each in (exact, copy.deepcopy(model)):
        each(input_ids=rows, labels=rows).loss.backward()
        found.append(in_one(parameter.grad for parameter in each.parameters() if parameter.requires_grad))
    return found[0], BOUND * error(found[1], found[0])


# ---------------------------------------------------------------------------------------------------------------- loops


def plain(model: Any, opt: Any, rows: Tensor, folder: Path) -> None:
    for row in rows.split(1):
        (model(input_ids=row, labels=row).loss / len(rows)).backward()
    opt.step()


def accelerate(model: Any, opt: Any, rows: Tensor, folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(rows))
    loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=1)  # type: ignore[arg-type,var-annotated]
    model, opt, loader = accelerator.prepare(model, opt, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            opt.step()
            opt.zero_grad()


def arguments(folder: Path, num: int, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 1, "gradient_accumulation_steps": num, "max_steps": 1,
        "max_grad_norm": 0.0, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "bf16": False, **options,
    }  # fmt: skip


def trainer(model: Any, opt: Any, rows: Tensor, folder: Path) -> None:
    dataset: Any = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(
        model, TrainingArguments(**arguments(folder, len(rows))), train_dataset=dataset, optimizers=(opt, None)
    ).train()


def trl(model: Any, opt: Any, rows: Tensor, folder: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(96)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t1", eos_token="t2")
    options = arguments(folder, len(rows), dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False)
    trl.SFTTrainer(
        model,
        trl.SFTConfig(**options),
        train_dataset=Dataset.from_list([{"input_ids": row.tolist()} for row in rows]),
        processing_class=tokenizer,
        optimizers=(opt, None),
    ).train()


def lightning(model: Any, opt: Any, rows: Tensor, folder: Path) -> None:
    pl: Any = pytest.importorskip("lightning")

    class Task(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, row: Tensor, _: int) -> Tensor:
            return self.model(input_ids=row, labels=row).loss  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return opt

    pl.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=len(rows), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    ).fit(Task(), torch.utils.data.DataLoader(rows, batch_size=1))  # type: ignore[arg-type]  # fmt: skip


LOOPS = [plain, accelerate, trainer, trl, lightning]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loop", LOOPS, ids=[loop.__name__ for loop in LOOPS])
def test_the_sum_is_as_accurate_as_one_batch(loop: Any, llama: LlamaForCausalLM, rows: Tensor, tmp_path: Path) -> None:
    model = annotate(llama, "bf16")
    exact, bound = allowed(model, rows)
    opt, gradients = observed(model)
    loop(model, opt, rows, tmp_path)
    assert error(gradients.found, exact) <= bound


@pytest.mark.parametrize("num", [8, 32])
def test_fewer_micro_batches(num: int, llama: LlamaForCausalLM, rows: Tensor, tmp_path: Path) -> None:
    model = annotate(llama, "bf16")
    exact, bound = allowed(model, rows[:num])
    opt, gradients = observed(model)
    plain(model, opt, rows[:num], tmp_path)
    assert error(gradients.found, exact) <= bound


def test_sums_in_bfloat16_fail(llama: LlamaForCausalLM, rows: Tensor, tmp_path: Path) -> None:
    """The bound catches what autograd does by itself."""
    model = annotate(llama, "bf16")
    exact, bound = allowed(model, rows)
    opt, gradients = observed(model)
    for parameter in model.parameters():
        parameter._backward_hooks.clear()  # type: ignore[union-attr]
    plain(model, opt, rows, tmp_path)
    assert error(gradients.found, exact) > 1.5 * bound


def test_adapters(llama: LlamaForCausalLM, rows: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=8)
    model = peft.get_peft_model(llama, adapters)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    annotate(model, "bf16")
    exact, bound = allowed(model, rows)
    opt, gradients = observed(model)
    plain(model, opt, rows, tmp_path)
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert error(gradients.found, exact) <= bound


def test_int8_weights(llama: LlamaForCausalLM, rows: Tensor, tmp_path: Path) -> None:
    """Against their gradients' sum in float64: what int8 products lose is not the sum's."""
    model: Any = annotate(llama, "int8")
    opt, gradients = observed(model)
    exact: Any = 0
    for row in rows.split(1):
        (model(input_ids=row, labels=row).loss / len(rows)).backward()
        exact = exact + in_one(parameter.grad for parameter in model.parameters())
        model.zero_grad()
    opt.zero_grad()
    plain(model, opt, rows, tmp_path)
    assert error(gradients.found, exact) <= 2**-9  # one rounding


def test_released_gradients_are_summed(llama: LlamaForCausalLM, rows: Tensor) -> None:
    model: Any = annotate(llama, "bf16")
    exact, bound = allowed(model, rows)
    opt, gradients = observed(model, release_gradients=True)
    with opt.no_update():
        for row in rows[:-1].split(1):
            (model(input_ids=row, labels=row).loss / NUM).backward()
    num_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert fxopt.footprint(model).gradients == 2 * num_bytes
    (model(input_ids=rows[-1:], labels=rows[-1:]).loss / NUM).backward()
    opt.step()
    assert fxopt.footprint(model).gradients == 0
    assert error(gradients.found, exact) <= bound


# ---------------------------------------------------------------------------------------------------------------- bytes


def test_two_more_bytes_while_summing_and_none_otherwise(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    model: Any = annotate(llama, "bf16")
    opt = optimizer(model)
    num_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())

    def held(num: int, set_to_none: bool = True) -> int:
        opt.zero_grad(set_to_none)
        for _ in range(num):
            model(input_ids=tokens, labels=tokens).loss.backward()
        opt.step()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.bfloat16}
        return fxopt.footprint(model).gradients

    assert [held(num) for num in (1, 2, 1, 5, 1)] == [num_bytes, 2 * num_bytes, num_bytes, 2 * num_bytes, num_bytes]
    assert [held(num, set_to_none=False) for num in (1, 1, 3, 1)] == [num_bytes, num_bytes, 2 * num_bytes, num_bytes]


def test_float32_parameters_are_summed_as_ever() -> None:
    parameter = nn.Parameter(torch.ones(4))
    Optimizer([parameter])
    for _ in range(3):
        (parameter * 0.1).sum().backward()
    assert parameter.grad is not None and residual_of(parameter.grad) is None
    assert torch.equal(parameter.grad, torch.full((4,), 0.1) + 0.1 + 0.1)


# ------------------------------------------------------------------------------------------------ who looks and changes


def weight(number: int = 1) -> Any:
    return nn.Parameter(torch.full((number,), 0.5, dtype=torch.bfloat16))


def sums(parameter: Any) -> bool:
    """Whether 64 additions that bfloat16 would lose, one by one, are there: 0.5 + 64 × 2⁻¹¹ = 0.53125."""
    (parameter * 0.5).sum().backward()
    for _ in range(64):
        (parameter * 2.0**-11).sum().backward()
    found = bool((parameter.grad == 0.53125).all())
    assert found or bool((parameter.grad == 0.5).all())
    parameter.grad = None
    return found


def test_zeros_in_place_and_clipping_begin_anew() -> None:
    parameter = weight()
    opt = Optimizer([parameter])
    assert sums(parameter)
    (parameter * 0.5).sum().backward()
    for _ in range(2):
        (parameter * 2.0**-10).sum().backward()
    torch.nn.utils.clip_grad_norm_([parameter], 0.25)
    assert parameter.grad.item() == pytest.approx(0.25, rel=1e-2)
    (parameter * 0.25).sum().backward()
    assert parameter.grad.item() == pytest.approx(0.5, rel=1e-2)  # nothing of what was there before it was clipped
    for set_to_zero in (opt.zero_grad, lambda _: parameter.grad.zero_()):
        set_to_zero(False)  # type: ignore[operator]
        assert parameter.grad.item() == 0
        (parameter * 0.5).sum().backward()
        for _ in range(64):
            (parameter * 2.0**-11).sum().backward()
        assert parameter.grad.item() == 0.53125


def test_differentiation_that_adds_nothing_is_left_alone() -> None:
    parameter = weight()
    Optimizer([parameter])
    for _ in range(3):
        (parameter * 0.125).sum().backward()
    before = parameter.grad.clone()
    (found,) = torch.autograd.grad((parameter * 0.75).sum(), parameter)
    assert found.item() == 0.75 and torch.equal(parameter.grad, before)
    (parameter * 0.125).sum().backward(inputs=[parameter])
    assert parameter.grad.item() == 0.5
    (parameter**2).sum().backward(create_graph=True)
    assert parameter.grad.item() == 1.5 and parameter.grad.requires_grad


def test_capture_between_two_micro_batches(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    """A batch of one row is captured anew, while there are gradients and what is kept beside them."""
    del llama.model.layers[1:]
    model: Any = fxopt.optimize(llama, "bf16", prove=False)
    opt = optimizer(model)
    for rows in (tokens, tokens, tokens[:1]):
        model(input_ids=rows, labels=rows).loss.backward()
    report = fxopt.report(model)
    assert len(report.graphs) == 2 and not report.fallbacks
    opt.step()


def test_gradients_that_are_no_plain_matrix() -> None:
    """Transposed, expanded and empty ones are summed too."""
    parameter = nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16))
    empty = nn.Parameter(torch.zeros(0, 4, dtype=torch.bfloat16))
    Optimizer([parameter, empty])
    for _ in range(3):
        (parameter.t().contiguous() * torch.ones(4, 6, dtype=torch.bfloat16)).sum().backward()
        empty.sum().backward()
    assert torch.equal(parameter.grad, torch.full((6, 4), 3, dtype=torch.bfloat16))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- hooks survive


def test_copies_and_pickles_sum() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    opt = Optimizer(model.parameters())
    for copied_model, copied in (copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):
        assert sums(copied_model.weight)
        assert copied_model.weight is copied.param_groups[0]["params"][0] is not model.weight
    assert sums(model.weight)
    alone = copy.deepcopy(model)
    assert not sums(alone.weight)  # which no optimizer of ours updates


def change_group(opt: Optimizer, _: nn.Module) -> Any:
    opt.add_param_group({"params": [added := weight()]})
    return added


def thaw(opt: Optimizer, model: Any) -> Any:
    model.weight.requires_grad_(False)
    again = Optimizer(model.parameters())
    model.weight.requires_grad_(True)
    again.step()
    model.kept = again
    return model.weight


def made_before_the_policy(_: Optimizer, model: Any) -> Any:
    model.early = nn.Parameter(torch.full((1,), 0.5))
    model.kept = Optimizer([model.early])
    model.early.data = model.early.data.bfloat16()
    return model.early


def second_optimizer_that_goes(opt: Optimizer, model: Any) -> Any:
    Optimizer(model.parameters())
    gc.collect()
    opt.step()
    return model.weight


CHANGES: dict[str, Callable[[Optimizer, Any], Any]] = {
    "added group": change_group,
    "loaded state": lambda opt, model: opt.load_state_dict(opt.state_dict()) or model.weight,  # type: ignore[func-returns-value]
    "moved": lambda opt, model: model._apply(torch.clone).weight,
    "frozen, then trained": thaw,
    "made before the policy": made_before_the_policy,
    "a second optimizer that goes": second_optimizer_that_goes,
    "a second optimizer": lambda opt, model: setattr(model, "kept", Optimizer(model.parameters())) or model.weight,  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("change", CHANGES)
def test_hooks_survive(change: str) -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    opt = Optimizer(model.parameters())
    parameter = CHANGES[change](opt, model)
    assert sums(parameter)
    assert len(parameter._backward_hooks) == 1


def test_int8_weights_that_were_moved_sum_again(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    model: Any = annotate(llama, "int8")
    opt = optimizer(model)
    model._apply(torch.clone)
    for _ in range(2):
        opt.zero_grad()
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
        opt.step()
    assert all(residual_of(p.grad) is not None for p in model.parameters() if p.grad.dtype == torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.dumps(model)


def test_hooks_keep_nothing() -> None:
    parameter = weight()
    opt = Optimizer([parameter])
    (parameter * 0.5).sum().backward()
    (parameter * 0.5).sum().backward()
    parameter.grad = None
    alive = weakref.ref(opt), weakref.ref(parameter)
    gc.collect()
    gc.disable()
    try:
        del opt
        assert alive[0]() is None  # at once: memory waits for no collection of garbage
        assert not sums(parameter)
        del parameter
        assert alive[1]() is None
    finally:
        gc.enable()


# -------------------------------------------------------------------------------------------------------- two processes


def test_two_processes_without_synchronization(tmp_path: Path) -> None:
    """DistributedDataParallel, `no_sync` for all passes but the last: it finds bfloat16 for its buckets."""
    script = Path(__file__).with_name("accumulate_on_two_ranks.py")
    command = [sys.executable, str(script), str(tmp_path / "store"), str(NUM)]
    processes = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    printed = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    lines = [line.split() for line in printed[0].splitlines()]
    assert len(lines) == 4
    for hooked, of_sum, of_one_batch in lines:
        assert (float(of_sum) <= BOUND * float(of_one_batch)) == (hooked == "True"), lines


@pytest.mark.filterwarnings("ignore:torch.optim.SGD steps")
def test_an_optimized_model_sums_before_it_has_an_optimizer(llama: LlamaForCausalLM, rows: Tensor) -> None:
    """In a loop with an optimizer of torch's, or with none so far; and each of two models by itself."""
    model = fxopt.optimize(llama, "bf16")
    exact, bound = allowed(fxopt.restore(copy.deepcopy(model)), rows)
    for each in (model, copy.deepcopy(model)):
        for _ in range(2):
            each.zero_grad()
            plain(each, torch.optim.SGD(each.parameters(), lr=0.0), rows, Path())
            assert error(in_one(parameter.grad for parameter in each.parameters()), exact) <= bound
        each.zero_grad(set_to_none=False)
        plain(each, torch.optim.SGD(each.parameters(), lr=0.0), rows, Path())
        assert error(in_one(parameter.grad for parameter in each.parameters()), exact) <= bound


def test_the_optimizer_takes_over(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    model = fxopt.optimize(llama, "bf16")
    model(input_ids=tokens, labels=tokens).loss.backward()
    first = optimizer(model, lr=1e-3)
    for parameter in model.parameters():
        (hook,) = parameter._backward_hooks.values()  # type: ignore[union-attr]
        assert hook.owner() is first._accumulated
    model.eval()  # a call of another kind
    model(input_ids=tokens, labels=tokens).loss.backward()
    hooks: Any = [p._backward_hooks for p in model.parameters()]
    assert all(hook.owner() is first._accumulated for each in hooks for hook in each.values())
    del first
    gc.collect()
    model(input_ids=tokens[:1], labels=tokens[:1]).loss.backward()


@pytest.fixture
def twice(tokens: Tensor) -> Callable[[nn.Module], None]:
    def run(model: nn.Module) -> None:
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()

    return run


def test_hooks_of_the_user_see_gradients_and_change_them(llama: LlamaForCausalLM, twice: Any) -> None:
    model = fxopt.optimize(llama, "bf16")
    twice(model)
    model.zero_grad()
    weight, seen = model.model.norm.weight, []
    weight.register_hook(lambda gradient: seen.append(float(gradient.abs().sum())))
    weight.register_hook(lambda gradient: gradient * (torch.arange(len(gradient)) < 4))
    twice(model)
    assert all(seen) and not weight.grad[4:].any() and weight.grad[:4].all()


def test_what_is_written_past_autograd_counts(llama: LlamaForCausalLM, twice: Any) -> None:
    model = fxopt.optimize(llama, "bf16")
    twice(model)
    exact = in_one(parameter.grad for parameter in model.parameters())
    twice(model)
    for parameter in model.parameters():
        parameter.grad.data.zero_()
    twice(model)
    assert error(in_one(parameter.grad for parameter in model.parameters()), exact) < 2**-9


def test_thawed_parameters_are_summed(llama: LlamaForCausalLM, twice: Any) -> None:
    model = fxopt.optimize(llama, "bf16")
    for parameter in model.model.layers.parameters():
        parameter.requires_grad_(False)
    twice(model)
    for parameter in model.parameters():
        parameter.requires_grad_()
    model.zero_grad()
    twice(model)
    assert all(residual_of(parameter.grad) is not None for parameter in model.parameters())


def test_saved_gradients_are_loaded_without_fxopt(llama: LlamaForCausalLM, twice: Any, tmp_path: Path) -> None:
    model = fxopt.optimize(llama, "bf16")
    twice(model)
    torch.save({name: parameter.grad for name, parameter in model.named_parameters()}, tmp_path / "gradients.pt")
    loaded = torch.load(tmp_path / "gradients.pt")
    assert torch.equal(loaded["model.norm.weight"], model.model.norm.weight.grad)
