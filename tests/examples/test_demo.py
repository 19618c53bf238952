"""The demo, the quickstart and the benchmarks run, on a tiny model."""

import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from examples.fine_tune import final_answer
from examples.process_memory import PeakMemory, resident_bytes

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = script if script == "-c" else ROOT / script
    return subprocess.run([sys.executable, program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=280)


def test_quickstart(tmp_path: Path) -> None:
    done = run("examples/01_quickstart.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.5
    assert "linear_cross_entropy" in done.stdout


def test_demo_prints_table_report_and_diff(tiny_model: Path, tmp_path: Path) -> None:
    options = ["--steps", "2", "--batch-size", "2", "--eval-problems", "2", "--max-new-tokens", "4"]
    done = run("examples/demo.py", "--model", tiny_model, "--output", tmp_path / "out", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("seconds per step", "peak memory", "bytes per parameter", "held-out loss after", "exact answers"):
        assert text in done.stdout
    assert "linear_cross_entropy" in done.stdout
    figures = {
        name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("plain", "mixed", "fxopt")
    }
    assert {name: column["bytes_per_parameter"] for name, column in figures.items()} == {
        "plain": 2.0,
        "mixed": 4.0,
        "fxopt": 2.0,
    }
    # The same batches in the same order: the first loss is the same, up to rounding.
    assert figures["fxopt"]["losses"][0] == pytest.approx(figures["plain"]["losses"][0], rel=5e-3)
    diff = Path(figures["fxopt"]["graph_diff"])
    assert diff.stat().st_size > 0
    assert str(diff) in done.stdout


def test_demo_names_a_wrong_variant_and_wrong_columns(tiny_model: Path, tmp_path: Path) -> None:
    done = run("examples/demo.py", "--variants", "plian", "--output", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "'plian'" in done.stderr
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n}"}) + "\n" for n in range(64)))
    options = ["--steps", "1", "--batch-size", "1", "--eval-problems", "1", "--variants", "plain"]
    done = run(
        "examples/demo.py", "--model", tiny_model, "--dataset", data, "--output", tmp_path, *options, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "has the columns ['text']" in done.stderr


def test_step_benchmark(tiny_model: Path, tmp_path: Path) -> None:
    options = [
        "--steps",
        "2",
        "--warmup",
        "1",
        "--repeats",
        "1",
        "--batch-size",
        "2",
        "--variants",
        "plain,fxopt",
    ]
    done = run("benchmarks/step.py", "--model", tiny_model, *options, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert set(figures) == {"plain", "fxopt"}
    for column in figures.values():
        assert column["step_seconds"] > 0
        assert column["peak_memory_bytes"] > 0
        assert column["loss"] == pytest.approx(figures["plain"]["loss"], rel=2e-2)


def test_step_benchmark_on_random_tokens(tiny_model: Path, tmp_path: Path) -> None:
    shape = ["--batch-size", "2", "--sequence-length", "16", "--vocab-size", "200", "--masked-fraction", "0.5"]
    options = ["--padding", "0.25", "--steps", "2", "--warmup", "1", "--repeats", "1", "--variants", "plain"]
    done = run("benchmarks/step.py", "--model", tiny_model, *shape, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "50% masked" in " ".join(done.stdout.split())  # wherever the lines end


def test_training_curve_is_drawn_and_not_run_twice(tiny_model: Path, tmp_path: Path) -> None:
    options = "--steps 2 --every 1 --batch-size 2 --eval-problems 2 --answers 2 --max-new-tokens 4".split()
    options += ["--variants", "bf16-8bit", "--seeds", "0"]
    arguments = ["--model", tiny_model, *options, "--output", tmp_path / "out"]
    done = run("benchmarks/training_curve.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mean of the seeds" in done.stdout and "What it costs" in done.stdout
    runs = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert {name: [list(record["held_out_loss"]) for record in records] for name, records in runs.items()} == {
        "bf16-8bit": [["0", "1", "2"]]
    }
    assert (tmp_path / "out" / "curves.png").stat().st_size > 0
    assert not list((tmp_path / "out").glob("*.pt"))
    written = (tmp_path / "out" / "bf16-8bit-0.json").stat().st_mtime_ns
    assert run("benchmarks/training_curve.py", *arguments, cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "bf16-8bit-0.json").stat().st_mtime_ns == written

    # One that is interrupted after a step goes on, and gives the same curve.
    complete = json.loads((tmp_path / "out" / "bf16-8bit-0.json").read_text())
    file = tmp_path / "again.json"
    file.write_text(json.dumps({"settings": complete["settings"], "held_out_loss": {}}))
    done = run("-c", INTERRUPTED_CURVE, file, cwd=ROOT)
    assert done.stderr.endswith("interrupted\n"), done.stderr
    assert list(json.loads(file.read_text())["held_out_loss"]) == ["0", "1"]
    done = run("benchmarks/training_curve.py", "--worker", file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["held_out_loss"] == complete["held_out_loss"]


INTERRUPTED_CURVE = """
import sys
from pathlib import Path

from benchmarks import training_curve
from examples import fine_tune

calls, original = iter([False, False, True]), fine_tune.held_out_loss
fine_tune.held_out_loss = lambda *args: sys.exit("interrupted") if next(calls) else original(*args)
training_curve.train(Path(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is 3 * 4 = 12.\n#### 12", "12"),
        ("#### 1,234 dollars", "1234"),
        ("so 7 apples. The answer is 42.", "42"),
        ("#### -3", "-3"),
        ("#### 2.5.", "2.5"),
        (" no number ", "no number"),
    ],
)
def test_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_peak_memory_sees_a_block_that_came_and_went() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("measures the GPU's memory where there is one")
    before = resident_bytes()
    # Fresh from the system: an allocator might hand out what it has left over.
    with PeakMemory() as memory, mmap.mmap(-1, 200_000_000) as block:
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)
    assert 150e6 < memory.peak_bytes - before < 300e6
