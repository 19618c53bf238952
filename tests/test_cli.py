"""The `fxopt` command: what it prints and writes, and its exit codes."""

import json
import logging
import re
import subprocess
import sys
import warnings

import pytest

from fxopt.cli import FAILED, INTERRUPTED, NOBODY_READS, WRONG_USE, main
from tests.tiny_models import SIZES


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **SIZES}))
    return str(path)


def test_inspect_and_diff(model, tmp_path, capsys):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    filters = list(warnings.filters)
    assert main(["inspect", model, "--seq", "33", "--json", str(one), "--html", str(tmp_path / "one")]) == 0
    assert logging.getLogger("fxopt").isEnabledFor(logging.WARNING) and warnings.filters == filters
    printed = capsys.readouterr().out
    assert "@@ transformers/models/llama/modeling_llama.py" in printed and "\nin all " in printed
    assert re.search(r"^-       activations\.py:\d+: return nn\.functional\.silu", printed, re.MULTILINE)
    assert (tmp_path / "one.html").stat().st_size > 100_000
    assert main(["inspect", model, "--seq", "33", "--policy", "fp32", "--no-proofs", "--json", str(two)]) == 0
    assert main(["diff", str(one), str(two)]) == 0
    assert "peak_bytes" in capsys.readouterr().out
    assert main(["diff", str(one), str(two), "--fail-if", "fusions < 3"]) == 0
    capsys.readouterr()
    assert main(["diff", str(one), str(two), "--fail-if", "fusions < 61"]) == FAILED
    assert "failed, since fusions < 61 (A 21, B 20)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "Llama-3.2-1C"], "nearest: meta-llama/Llama-3.2-1B"),
        (["inspect", "Llama-3.2-1B", "--policy", "bf61"], "unknown policy 'bf61'; nearest: 'bf16'"),
        (["plan", "Llama-3.2-1B", "--policy", "nothere.yaml"], "there is no policy file nothere.yaml"),
        (["inspect", "Llama-3.2-1B", "--seq", "0"], "--seq is 0"),
        (["inspect", "SmolLM2-135M", "--seq", "9000"], "takes 8192 at most"),
        (["plan", "SmolLM2-135M", "--memory", "24 apples"], "a size such as 24GB"),
        (["plan", "SmolLM2-135M", "--memory", "24"], "a size such as 24GB"),
        (["plan", "SmolLM2-135M", "--memory", "1.2.3GB"], "a size such as 24GB"),
        (["plan", "SmolLM2-135M", "--devices", "0"], "--devices is 0"),
        (["plan", "SmolLM2-135M", "--policy", "bf16,bf61"], "unknown policy 'bf61'; nearest: 'bf16'"),
        (["plan", "SmolLM2-135M", "--accuracy", "high"], "known: critical, normal, tolerant"),
        (["plan", "SmolLM2-136M"], "unknown model 'SmolLM2-136M'; nearest: HuggingFaceTB/SmolLM2-"),
        (["diff", "a.json", "b.json"], "a.json cannot be read: No such file"),
        (["diff", "a.json", "b.json", "--fail-if", "many"], "'many' is no condition"),
        (["inspect", "SmolLM2-135M", "--html", "gone/a.html"], "there is no folder gone to write a.html into"),
        (["plan", "SmolLM2-135M", "--json", "gone/a"], "there is no folder gone to write a.json into"),
        (["doctor", "--json", "gone/a.json"], "there is no folder gone"),
        (["inspect", "SmolLM2-135M", "--json", "."], ". is a folder; --json takes the name of a file"),
        (
            ["inspect", "SmolLM2-135M", "--json", "a.html"],
            "--json writes a file that ends in .json, and a.html",
        ),
        (["inspect", "SmolLM2-135M", "--model-explorer", "a.json"], "that ends in .model-explorer.json"),
        (["inspect", "SmolLM2-135M", "--html", "/proc/a.html"], "/proc/a.html cannot be written"),
        (["inspect", "t5"], "t5 is no causal language model"),
    ],
)
def test_errors_say_what_to_do(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == WRONG_USE
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_an_interrupt_is_no_error_of_ours(capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fxopt.api.inspect", interrupted)
    assert main(["inspect", "SmolLM2-135M"]) == INTERRUPTED == 130
    assert capsys.readouterr().err == "fxopt inspect: interrupted\n"


def test_who_stops_reading_is_no_error(model, tmp_path):
    """The files are written all the same."""
    page = tmp_path / "one.html"
    command = [sys.executable, "-m", "fxopt.cli", "inspect", model, "--seq", "8", "--no-proofs", "--html", str(page)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == NOBODY_READS and "fxopt inspect:" not in errors and "BrokenPipe" not in errors
    assert page.stat().st_size > 100_000


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["inspekt"])
    assert exit.value.code == WRONG_USE and "inspect" in capsys.readouterr().err


def test_plan(model, tmp_path, capsys):
    page = tmp_path / "plan.html"
    command = ["plan", model, "--policy", "bf16", "--memory", "50mb", "--seq", "32", "--html", str(page)]
    assert main([*command, "--json", str(tmp_path / "plan")]) == 0
    printed = capsys.readouterr().out
    assert "→ bf16" in printed and "the most rows × 32 tokens" in printed and f"wrote {page}" in printed
    rows = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert len(rows) == 4 and all(row["batch_size"] > 0 and row["peak"] <= 50e6 for row in rows)
    assert main(["plan", model, "--policy", "bf16", "--memory", "100kB", "--seq", "32"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "take bf16-8bit, int8, shorter rows, more devices, or adapters (PEFT)" in printed
    assert "where rows are 0 not even one fits" in printed
