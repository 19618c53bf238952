"""Loops of one's own, Accelerate, Lightning and PEFT: the same losses and gradients, every fusion, no logits."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from tests.stacks.runs import assert_alike, both
from tests.tiny_models import tiny_batch, tiny_llama


def batches(number: int = 2) -> list[dict[str, torch.Tensor]]:
    found = []
    for turn in range(number):
        batch = tiny_batch(num_rows=4)
        found.append({**batch, "input_ids": batch["input_ids"].roll(turn, 1), "labels": batch["labels"].roll(turn, 1)})
    return found


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def loop(model: nn.Module, loss_of: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in batches():
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def with_labels(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def of_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(**without_labels(batch)).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def of_log_probs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """As in preference optimization: the better half of the rows should become more likely than the other."""
    results = fxopt.token_log_probs(model(**without_labels(batch)), batch["labels"], entropy=True)
    better, worse = results.log_prob.sum(-1).chunk(2)
    return -nn.functional.logsigmoid(better - worse).mean() - 0.01 * results.entropy.mean()


def of_a_teacher(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Distillation: the loss reads all logits."""
    teacher = fxopt.restore(copy.deepcopy(model)).eval().requires_grad_(False)
    given = without_labels(batch)
    truth = teacher(**given).logits.flip(0).log_softmax(-1)
    return nn.functional.kl_div(model(**given).logits.log_softmax(-1), truth, log_target=True, reduction="batchmean")


@pytest.mark.parametrize(
    ("loss_of", "expected"),
    [
        (with_labels, {"loss_is_fused": True}),
        (of_logits, {"reads_logits": True}),
        (of_log_probs, {}),
        (of_a_teacher, {"reads_logits": True}),
    ],
)
def test_a_loop_of_ones_own(loss_of, expected):
    assert_alike(*both(lambda model: loop(model, loss_of)), **expected)


@pytest.mark.parametrize("way", ["compiled", "compile()"])
def test_inside_torch_compile(way):
    def train(model: nn.Module) -> list[float]:
        if way == "compile()":
            model.compile(backend="eager")
            return loop(model, with_labels)
        return loop(torch.compile(model, backend="eager"), with_labels)  # type: ignore[arg-type]

    plain, optimized = both(train)
    assert_alike(plain, optimized, loss_is_fused=True)
    assert optimized.report.under_compiler == 2


def test_generation_that_compiles_sees_the_original():
    model = fxopt.optimize(tiny_llama(), "fp32").eval()
    seen = []

    def backend(module: Any, inputs: Any) -> Any:
        seen.append(len(module.graph.nodes))
        return module.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(tiny_batch()["input_ids"], use_cache=False)
    assert len(seen) == 1 and seen[0] > 50 and not fxopt.report(model).under_compiler


def test_a_call_while_another_thread_compiles_is_optimized():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32")
    compiling, done = threading.Event(), threading.Event()

    def slow(module: Any, inputs: Any) -> Any:
        compiling.set()
        done.wait(60)
        return module.forward

    other = threading.Thread(target=lambda: torch.compile(lambda x: x * 2 + 1, backend=slow)(torch.ones(3)))
    mine = threading.Thread(target=lambda: model(**tiny_batch()))
    other.start()
    assert compiling.wait(60)
    mine.start()  # waits for the compiler, or goes on: it is not left unoptimized
    mine.join(1)
    done.set()
    other.join(60)
    mine.join(60)
    assert fxopt.report(model).optimized == {"": 1} and not fxopt.report(model).uncovered


def test_accelerate():
    from accelerate import Accelerator

    def train(model: nn.Module) -> list[float]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        prepared, stepping = accelerator.prepare(model, optimizer)
        losses = []
        for batch in batches(4):
            with accelerator.accumulate(prepared):
                loss = prepared(**batch).loss
                accelerator.backward(loss)
                stepping.step()
                stepping.zero_grad()
            losses.append(float(loss.detach()))
        accelerator.free_memory()
        return losses

    assert_alike(*both(train), loss_is_fused=True)


def test_accelerates_autocast_comes_off_again():
    """Its `unwrap_model` binds what it takes for the original forward, as a method, to the model."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model = fxopt.optimize(tiny_llama(), "fp32")
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        prepared = accelerator.prepare(model)
        with pytest.warns(UserWarning, match="mixed_precision='no'"):
            prepared(**tiny_batch()).loss.backward()
        assert fxopt.report(model).logits_computed == 0
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert unwrapped(**tiny_batch()).loss.dtype == torch.float32
        assert fxopt.report(unwrapped).forward_replaced == ""
        assert fxopt.report(unwrapped).optimized == {"": 2}
    finally:
        accelerator.free_memory()
        AcceleratorState._reset_state(reset_partial_state=True)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            loss = self.model(**batch).loss
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def train(model: nn.Module) -> list[float]:
        module = Module(model)
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
        return module.losses

    assert_alike(*both(train), loss_is_fused=True)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj", "down_proj"]}, {"target_modules": ["v_proj"], "use_dora": True}]
)
def test_adapters(options):
    from peft import LoraConfig, get_peft_model

    def train(model: nn.Module) -> list[float]:
        torch.manual_seed(2)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights="gaussian", **options))
        return loop(adapted, with_labels)

    assert_alike(*both(train), loss_is_fused=True)


def test_two_models_at_once():
    class Pair(nn.Module):
        def __init__(self, left: nn.Module, right: nn.Module) -> None:
            super().__init__()
            self.left, self.right = left, right

    pair = Pair(fxopt.optimize(tiny_llama(), "fp32"), fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32"))
    sum(model(**tiny_batch()).loss for model in (pair.left, pair.right)).backward()
    assert fxopt.report(pair.left).hits["rms_norm"] == 5 and fxopt.report(pair.right).hits["rms_norm"] == 3
    with pytest.raises(ValueError, match=r"'left'.*'right'"):
        fxopt.report(pair)
