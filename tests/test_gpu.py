"""What only a GPU can show: whole models on the Triton kernels, every preset, and which kernels run."""

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fxopt
from benchmarks import coverage
from fxopt.precision.presets import policies
from fxopt.precision.quantized import has_float8
from tests.tiny_models import LLAMA_HITS, tiny_batch, tiny_llama

pytestmark = pytest.mark.gpu

GPU = "cuda"


def batch_on_gpu(**options):
    return {name: tensor.to(GPU) for name, tensor in tiny_batch(**options).items()}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gemma2", "gpt_neox", "cohere2", "gpt_oss", "nemotron", "phi3"])
def test_everything_is_rewritten_and_trains_alike(model_type):
    row = coverage.cover(model_type, GPU)
    for policy in coverage.POLICIES:
        found = row[policy]
        assert not found["violations"] and not found["refused"] and not found["fallbacks"], found
        assert all(row["sites"].get(kind, 0) <= found["hits"][kind] for kind in coverage.OPS_OF), (row, found)


@pytest.mark.parametrize("preset", [*policies(), "auto"])
@pytest.mark.parametrize("released", [False, True])
def test_presets_train(preset, released):
    if preset == "fp8" and not has_float8(torch.device(GPU)):
        pytest.skip("this GPU has no float8 products")
    # Wide enough for torchao's blocks of 256 and for float8's multiples of 16.
    model = tiny_llama(vocab_size=512, hidden_size=256, intermediate_size=512).to(GPU)
    model = fxopt.optimize(model, preset)
    optimizer = fxopt.optimizer(model, lr=1e-3, weight_decay=0.0, release_gradients=released)
    batch = batch_on_gpu(num_rows=8, length=32)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    report = fxopt.report(model)
    assert not report.fallbacks
    assert report.hits["linear_cross_entropy"] == 1
    assert model.generate(batch["input_ids"][:, :4], max_new_tokens=4, do_sample=False).shape == (8, 8)


def test_attention_without_a_mask_is_flash_attention():
    model = fxopt.optimize(tiny_llama(hidden_size=256).to(GPU), "bf16")
    batch = batch_on_gpu(length=64)
    model(**batch).loss.backward()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        model(**batch).loss.backward()
        torch.cuda.synchronize()
    kernels = {event.key for event in profiled.key_averages()}
    assert any("flash" in kernel for kernel in kernels), kernels
    for kernel in ("_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel", "_glu_fwd_kernel", "_rope_kernel"):
        assert kernel in kernels, kernels
    assert fxopt.report(model).hits == LLAMA_HITS


@pytest.mark.parametrize(
    "batch", [{"padding": 6}, {"num_rows": 1}, {"length": 33}, {"num_rows": 5, "length": 1}], ids=str
)
def test_any_batch(batch):
    model = fxopt.optimize(tiny_llama().to(GPU), "fp32")
    assert fxopt.verify(model, batch_on_gpu(**batch)).holds


def test_all_labels_masked():
    model = fxopt.optimize(tiny_llama().to(GPU), "bf16")
    batch = batch_on_gpu()
    batch["labels"].fill_(-100)
    loss = model(**batch, num_items_in_batch=torch.tensor(1, device=GPU)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_inductor():
    model = fxopt.optimize(tiny_llama().to(GPU), "fp32", backend="inductor")
    batches = [batch_on_gpu(), batch_on_gpu(padding=6)]
    outcome = fxopt.verify(model, *batches)
    assert outcome.holds, outcome.failures
    assert not fxopt.report(model).fallbacks


def test_gradient_checkpointing():
    model = tiny_llama().to(GPU)
    model.gradient_checkpointing_enable()
    outcome = fxopt.verify(fxopt.optimize(model, "fp32"), batch_on_gpu(), batch_on_gpu(padding=6))
    assert outcome.holds, outcome.failures


def test_training_repeats_bit_by_bit():
    """The kernels add rows up in a fixed order: no atomics."""
    trained = []
    model = tiny_llama().to(GPU)
    for _ in range(2):
        twin = fxopt.optimize(copy.deepcopy(model), "bf16")
        optimizer = fxopt.optimizer(twin, lr=1e-3)
        for _ in range(3):
            twin(**batch_on_gpu(num_rows=8, length=64)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(twin.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
