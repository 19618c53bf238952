"""`fxopt doctor`: what is tried, what is shown of what fails, and the exit codes."""

import functools
import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch

import fxopt
from fxopt.cli import FAILED, WRONG_USE, _print, main
from fxopt.diagnosis import processes, trials
from fxopt.diagnosis.check import Check, Diagnosis
from fxopt.diagnosis.doctor import hub_check
from fxopt.diagnosis.processes import NOT_TRIED, try_all
from fxopt.diagnosis.versions import interpreter, version_checks, with_imports
from fxopt.error_lines import in_a_line
from fxopt.rewrite.pipeline import Pass, Pipeline

# Stands for `fxopt.diagnosis.trials`: the same protocol, and for each trial what the test says.
FAKE = """
import json, os, signal, sys, time
outcomes, request = json.loads(sys.argv[1]), json.loads(sys.argv[2])
say = lambda **message: print(json.dumps(message), flush=True)
if "start" in outcomes:
    sys.exit(outcomes["start"])
if request["device"] == "cdua":
    say(refused="no device 'cdua'")
    sys.exit()
plan = [["presets", "fp32"], ["presets", "bf16"], ["backends", "eager"]]
say(plan=plan, device="cpu", nearest={"bf16": ["mixed", "fp32"]})
for area, name in plan:
    if [area, name] in request["done"]:
        continue
    say(start=[area, name])
    outcome = outcomes.get(name, "ok")
    if outcome == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if outcome == "hang":
        time.sleep(60)
    why = "" if outcome == "ok" else outcome
    state, needed = "ok" if outcome == "ok" else "unsupported", name == "bf16"
    say(checks=[{"area": area, "name": name, "state": state, "found": "loss 4.84", "why": why, "needed": needed}])
    if outcome == "leave":
        sys.exit()
say(end=True)
"""


@pytest.fixture
def pretend(monkeypatch):
    """Sets what the trials come to; "ok" where nothing is said."""

    def set_outcomes(**outcomes: str) -> None:
        monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", FAKE, json.dumps(outcomes)))

    return set_outcomes


# Versions


def test_a_broken_range_gives_the_command_that_mends_it():
    checks = {check.name: check for check in version_checks(["torch>=99,<100", "networkx", "no-such-package>=2"])}
    assert checks["torch"] == Check(
        "versions", "torch", "unsupported", metadata.version("torch"), "fxopt needs <100,>=99",
        f"{interpreter()} -m pip install 'torch<100,>=99'", needed=True,
    )  # fmt: skip
    assert checks["networkx"].state == "ok" and not checks["networkx"].mend
    missing = checks["no-such-package"]
    assert (missing.state, missing.needed) == ("missing", True)
    assert missing.mend.endswith("-m pip install 'no-such-package>=2'")


def test_markers_and_extras_are_heeded():
    declared = ["nothing; sys_platform == 'elsewhere'", "no-extra; extra == 'dev'", "peft>=99; extra == 'dev'"]
    checks = {check.name: check for check in version_checks(declared)}
    assert not {"nothing", "no-extra"} & set(checks)
    assert checks["peft"].state != "ok" and "peft>=99" in checks["peft"].mend


def test_the_ranges_are_those_that_fxopt_declares():
    checks = {check.name: check for check in version_checks()}
    assert {"python", "fxopt", "torch", "transformers", "torchao", "datasets", "networkx", "accelerate"} <= set(checks)
    assert checks["torch"].found.startswith(f"{metadata.version('torch')} (") and "<2.16" in checks["torch"].found


def test_a_missing_optional_package_is_not_needed(monkeypatch):
    version = metadata.version

    def without_peft(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_peft)
    peft = next(check for check in version_checks() if check.name == "peft")
    assert (peft.state, peft.needed) == ("missing", False) and peft.mend.endswith("-m pip install 'peft>=0.21'")


def test_a_package_that_cannot_be_imported_is_to_be_installed_again():
    found = []
    for name in ("torch", "peft"):
        attempt = functools.partial(trials._import, name, "no_such_module")
        assert not trials.attempt(trials.Trial("imports", name, attempt), _into(found))
    imports = [Check(**check) for message in found for check in message.get("checks", ())]
    versions = [Check("versions", name, "ok", "1.0", needed=name == "torch") for name in ("torch", "rich", "peft")]
    torch_check, rich_check, peft_check = with_imports(versions, imports)
    assert (torch_check.state, torch_check.needed, rich_check.state) == ("unsupported", True, "ok")
    assert torch_check.why == "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"
    version = metadata.version("torch").partition("+")[0]
    assert torch_check.mend.endswith(f"-m pip install --force-reinstall torch=={version}")
    assert "like torch" in peft_check.why and not peft_check.mend


# Trials


def _into(found):
    return lambda **message: found.append(message)


def _run(*wanted):
    """What the trials named say, of all those that there are on the CPU."""
    found = []
    planned = [(trial.area, trial.name) for trial in trials._trials(torch.device("cpu"))]
    assert set(wanted) <= set(planned)
    trials.run("cpu", {}, [trial for trial in planned if trial not in wanted], _into(found))
    assert found[-1] == {"end": True}
    checks = [Check(**check) for message in found for check in message.get("checks", ())]
    return {check.name: check for check in checks}


def test_what_works_on_a_cpu_is_found_by_trying():
    names = ["int8", "fp8", "bf16"]
    checks = _run(("device", "CPU"), *(("presets", name) for name in names), ("kernels", "Triton"))
    assert checks["CPU"].state == "ok" and "memory" in checks["CPU"].found
    assert checks["bf16"].state == "ok" and checks["bf16"].needed
    assert "12 of 12 parameters changed, 12 rewrites" in checks["bf16"].found
    assert checks["int8"].state == "ok" and not checks["int8"].needed
    assert checks["fp8"].state == "unsupported"
    assert checks["fp8"].why.startswith("PolicyError: cpu has no float8 products")
    assert "not used on cpu" in checks["Triton"].found


def test_each_preset_and_backend_has_a_trial():
    planned = [(trial.area, trial.name) for trial in trials._trials(torch.device("cpu"))]
    assert {name for area, name in planned if area == "presets"} == {*fxopt.policies(), "auto"}
    assert [name for area, name in planned if area == "backends"] == ["eager", "inductor"]


def test_the_nearest_preset_has_most_in_common():
    presets = fxopt.policies()
    assert trials._nearest(presets["fp8"], presets)[0] == "bf16-8bit"
    assert trials._nearest(presets["bf16"], presets)[0] == "bf16-islands"


def test_a_step_that_changes_nothing_or_is_not_optimized_does_not_pass(monkeypatch):
    from fxopt import api

    optimize, cpu = api.optimize, torch.device("cpu")
    monkeypatch.setattr(api, "optimize", lambda model, policy, backend: fxopt.annotate(model, policy))
    monkeypatch.setattr(trials, "LEARNING_RATE", 0.0)
    with pytest.raises(RuntimeError, match="12 of 12 parameters did not change"):
        trials.training_step("fp32", cpu)
    monkeypatch.setattr(trials, "LEARNING_RATE", 1e-2)
    broken = Pipeline((Pass("broken", None),))
    monkeypatch.setattr(api, "optimize", lambda model, policy, backend: optimize(model, policy, pipeline=broken))
    with pytest.raises(trials.NotOptimizedError, match="runs the original forward: PassError: the pass 'broken'"):
        trials.training_step("fp32", cpu)


@pytest.mark.parametrize(
    ("manager", "command"), [("apt-get", "apt-get install g++"), ("dnf", "dnf install gcc-c++"), ("", "")]
)
def test_inductor_without_a_compiler_names_the_package_that_has_one(manager, command, tmp_path, monkeypatch):
    if manager:
        (tmp_path / manager).write_text("")
        (tmp_path / manager).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "platform", "linux")

    def no_compiler(*args, **options):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(trials, "training_step", no_compiler)
    (check,) = trials.backend("inductor", torch.device("cpu"))
    assert check.state == "missing" and "No working C++ compiler found; a C++ compiler is missing" in check.why
    assert check.mend == (f"sudo {command}" if command else "")


def test_what_compiling_lacks(tmp_path, monkeypatch):
    (tmp_path / "gcc").touch(0o755)
    (tmp_path / "apk").touch(0o755)
    (tmp_path / "Python.h").touch()
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert trials.missing_tool() is None
    (tmp_path / "Python.h").unlink()
    assert trials.missing_tool() == ("Python's headers are missing", "apk add python3-dev")
    monkeypatch.setenv("CXX", "g++-99 -v")
    assert trials.missing_tool() == ("CXX names no program", "unset CXX")


def test_triton_without_a_compiler_names_the_package_that_has_one(monkeypatch):
    """As on a GPU, where a launcher is compiled for each kernel."""

    def no_compiler(*args):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("fxopt.kernels.backend.TRITON_DEVICES", ("cpu",))
    monkeypatch.setattr("fxopt.kernels.rms_norm.rms_norm", no_compiler)
    monkeypatch.setattr(trials, "missing_tool", lambda: ("a C++ compiler is missing", "apk add g++"))
    (check,) = trials.triton_kernels(torch.device("cpu"))
    assert (check.state, check.mend) == ("missing", "apk add g++")
    assert check.why == "RuntimeError: Failed to find C compiler; a C++ compiler is missing"


def test_a_compilers_error_is_told_in_its_own_line():
    error = RuntimeError("C++ compile error\n\nCommand:\ng++ x.cpp\n\nx.cpp:1:10: fatal error: Python.h: No such file")
    assert in_a_line(error) == "RuntimeError: x.cpp:1:10: fatal error: Python.h: No such file"


def test_the_process_that_tries_speaks_json_alone():
    """The real one, with all but a preset that fails at once done."""
    planned = [(trial.area, trial.name) for trial in trials._trials(torch.device("cpu"))]
    done = [trial for trial in planned if trial != ("presets", "fp8")]
    request = json.dumps({"device": "cpu", "packages": {"rich": "rich"}, "done": done})
    ran = subprocess.run([*processes.COMMAND, request], capture_output=True, text=True, env=processes._environment(""))
    messages = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [set(message) for message in messages] == [
        {"plan"}, {"start"}, {"checks"}, {"plan", "device", "nearest"}, {"start"}, {"checks"}, {"end"},
    ]  # fmt: skip
    assert "float8" in messages[-2]["checks"][0]["why"]


# Processes


def test_a_crash_is_a_finding_and_the_rest_goes_on(pretend):
    pretend(bf16="crash")
    fp32, bf16, eager = try_all(None, {}).checks()
    assert fp32.state == eager.state == "ok"
    assert (bf16.state, bf16.needed) == ("unsupported", True)
    assert bf16.why == "the process was ended by SIGSEGV" and bf16.mend == 'fxopt.optimize(model, "fp32")'


def test_a_trial_that_hangs_is_ended(pretend, monkeypatch):
    monkeypatch.setattr(processes, "SILENCE_S", 1.0)
    pretend(fp32="hang")
    fp32, bf16, eager = try_all(None, {}).checks()
    assert fp32.why == "no answer in 1 s" and bf16.state == eager.state == "ok"


def test_a_broken_device_gets_another_process(pretend):
    pretend(fp32="leave")
    assert [check.why for check in try_all(None, {}).checks()] == ["leave", "", ""]


def test_too_many_crashes_end_it(pretend, monkeypatch):
    monkeypatch.setattr(processes, "MOST_PROCESSES", 2)
    pretend(fp32="crash", bf16="crash")
    assert try_all(None, {}).checks()[2].why == NOT_TRIED


# The command


def test_exit_codes(pretend, capsys, monkeypatch):
    pretend()
    assert main(["doctor"]) == 0
    assert "works here: training on cpu" in capsys.readouterr().out
    pretend(fp32="FormatError: none")  # not the default preset
    assert main(["doctor"]) == 0
    pretend(bf16="FormatError: no such format")
    assert main(["doctor"]) == FAILED
    out = capsys.readouterr().out
    assert "does not work here: bf16" in out and "FormatError: no such format" in out
    pretend(start="ImportError: libtorch.so: no such file")
    assert main(["doctor"]) == FAILED
    assert "ImportError: libtorch.so: no such file" in capsys.readouterr().out
    assert main(["doctor", "--device", "cdua"]) == FAILED  # it cannot even ask
    pretend()
    assert main(["doctor", "--device", "cdua"]) == WRONG_USE
    assert "fxopt doctor: no device 'cdua'" in capsys.readouterr().err
    monkeypatch.setattr("fxopt.diagnosis.versions.metadata.requires", lambda name: ["transformers>=99"])
    assert main(["doctor"]) == FAILED
    assert "-m pip install 'transformers>=99'" in capsys.readouterr().out


def test_json_equals_what_is_printed(pretend, capsys, tmp_path):
    pretend(bf16="FormatError: no such format, and " + "many " * 60 + "words about it")
    path = tmp_path / "found"
    assert main(["doctor", "--json", str(path)]) == FAILED
    printed = " ".join(capsys.readouterr().out.split())
    found = json.loads(path.with_suffix(".json").read_text())
    assert (found["schema"], found["version"], found["works"]) == ("fxopt.diagnosis", 1, False)
    assert f"fxopt {found['fxopt']} does not work here" in printed
    assert len(found["checks"]) > 12
    for check in found["checks"]:
        for field in ("found", "why"):
            assert check[field] in printed
        assert f"{check['state']} {check['name']}" in printed
        assert not check["mend"] or f"{check['name']}: {check['mend']}" in printed


def test_a_command_is_printed_as_one_line_however_long(capsys):
    mend = "python -m pip install" + " a-long-name" * 20
    diagnosis = Diagnosis("1.0", "cpu", (Check("versions", "torch", "missing", mend=mend),))
    assert not diagnosis.works  # nothing was trained
    _print(diagnosis)
    assert f"torch: {mend}" in capsys.readouterr().out.splitlines()
    assert f"torch: {mend}" in str(diagnosis).splitlines()
    with pytest.raises(KeyError, match="there are: torch"):
        diagnosis.check("versions", "trch")
    with pytest.raises(ValueError, match=r"ends in \.json"):
        diagnosis.save("diagnosis.txt")


# The Hub


def test_the_hub(monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    assert hub_check(lambda: "the-hub") == Check("hub", "Hub", "ok", "the-hub answers")

    def refuses() -> str:
        raise OSError("Name or service not known")

    unreachable = hub_check(refuses)
    assert unreachable.state == "missing" and not unreachable.needed
    assert unreachable.why.startswith("OSError: Name or service not known; `fxopt inspect org/name` needs it")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    offline = hub_check(refuses)  # is not asked
    assert "TRANSFORMERS_OFFLINE is set" in offline.why and offline.mend == "unset TRANSFORMERS_OFFLINE"
