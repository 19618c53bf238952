"""The house: packaging, the two links, layering, and living beside the package `kernels` of the package index."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import fxopt

ROOT = Path(__file__).resolve().parents[1]

# DESIGN: a module imports from lower floors and from its own; rewrite and precision, both on floor 1, not each other.
FLOORS = {
    "fxopt.kernels": 0,
    "fxopt.rewrite": 1,
    "fxopt.precision": 1,
    "fxopt.passes": 2,
    "fxopt.call_warnings": 3,
    "fxopt.deferred_logits": 3,
    "fxopt.deferred_tensor": 3,
    "fxopt.dynamo": 3,
    "fxopt.entries": 3,
    "fxopt.log_probs": 3,
    "fxopt.output_head": 3,
    "fxopt.rematerialize": 3,
    "fxopt.training_call": 3,
    "fxopt.capture": 3,
    "fxopt.verification": 3,
    "fxopt.arguments": 0,
    "fxopt.atomic_file": 0,
    "fxopt.float64": 0,
    "fxopt.model_state": 0,
    "fxopt.printing": 0,
    "fxopt.progress": 0,
    "fxopt.error_lines": 0,
    "fxopt.inspection": 4,
    "fxopt.api": 5,
    "fxopt.diagnosis": 6,
    "fxopt.planning": 6,
    "fxopt.cli": 6,
    "fxopt.integrations": 6,
    "fxopt": 7,
}
KERNELS_MAY_IMPORT = {"torch", "triton"} | sys.stdlib_module_names


def sources() -> dict[str, Path]:
    """Module name to file, of everything that is shipped."""
    found = {}
    for prefix, folder in (
        ("fxopt", ROOT / "fxopt"),
        ("fxopt.passes", ROOT / "passes"),
        ("fxopt.kernels", ROOT / "kernels"),
    ):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if prefix == "fxopt" and parts[0] in ("passes", "kernels"):
                continue
            found[".".join([prefix, *(part for part in parts if part != "__init__")])] = path
    return found


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, imported module) for every import in the file, wherever it stands; relative ones start with a dot."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from fxopt import kernels` imports the module fxopt.kernels.
            inside = [f"{module}.{alias.name}" for alias in node.names]
            known = [name for name in inside if _floor_key(name) == name]
            found += [(node.lineno, name) for name in known or [module]]
    return found


def _floor_key(module: str) -> str:
    parts = module.split(".")
    return next((key for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in FLOORS), "")


def violations(module: str, path: Path) -> list[str]:
    found = []
    here = _floor_key(module)
    for line, target in imports_of(path):
        where = f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{line} imports {target}"
        there = _floor_key(target)
        if target.startswith("."):
            found.append(f"{where}: relative")
        elif target.split(".")[0] in ("kernels", "passes"):
            found.append(f"{where}: a second copy of fxopt.{target}")
        elif here == "fxopt.kernels" and there != here and target.split(".")[0] not in KERNELS_MAY_IMPORT:
            found.append(f"{where}: a kernel imports torch and triton only")
        elif there and there != here:
            same_floor_apart = FLOORS[here] == FLOORS[there] == 1
            if FLOORS[there] > FLOORS[here] or same_floor_apart:
                found.append(f"{where}: floor {FLOORS[here]} may not import floor {FLOORS[there]}")
    return found


def test_every_module_stands_on_a_floor() -> None:
    lost = [module for module in sources() if module != "fxopt" and _floor_key(module) == "fxopt"]
    assert not lost, f"give these a floor in {__file__}: {lost}"


def test_imports_go_downwards_only() -> None:
    assert not [found for module, path in sources().items() for found in violations(module, path)]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fxopt.rewrite.match", "from fxopt.passes.pipelines import EXACT"),
        ("fxopt.rewrite.match", "from fxopt.precision import policy"),
        ("fxopt.precision.policy", "from . import roles"),
        ("fxopt.passes.fuse_glu", "from fxopt import api"),
        ("fxopt.kernels.glu", "from fxopt.rewrite import graph"),
        ("fxopt.kernels.glu", "import transformers"),
        ("fxopt.capture", "def f():\n    import kernels.glu"),
        ("fxopt.api", "from fxopt import optimize"),
    ],
)
def test_a_forbidden_import_is_found(module: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(line)
    assert violations(module, path)


def test_links_are_relative() -> None:
    for name in ("passes", "kernels"):
        assert (ROOT / "fxopt" / name).readlink() == Path("..") / name


def test_packages_are_all_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {
        module if path.name == "__init__.py" else module.rpartition(".")[0] for module, path in sources().items()
    }
    assert set(listed) == packages


def test_public_names() -> None:
    for name in fxopt.__all__:
        assert getattr(fxopt, name).__name__ == name
        assert name in dir(fxopt)
    with pytest.raises(AttributeError, match="optimise"):
        _ = fxopt.optimise


def test_import_is_light() -> None:
    loaded = python("import fxopt, json, sys; print(json.dumps(list(sys.modules)))", cwd=ROOT)
    assert not {"torch", "transformers", "triton", "networkx"} & set(json.loads(loaded))


# The package `kernels` -----------------------------------------------------------------------------------------------


def test_transformers_finds_no_kernels_package_in_our_folder(tmp_path: Path) -> None:
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert python(code, cwd=ROOT) == python(code, cwd=tmp_path)


def test_the_real_kernels_package_wins_at_the_root(tmp_path: Path) -> None:
    """Without an `__init__.py` our folder is no package to Python, and a real one anywhere on the path comes first."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    code = "import importlib.util; print(importlib.util.find_spec('kernels').origin)"
    assert python(code, cwd=ROOT, path=tmp_path).strip() == str(tmp_path / "kernels" / "__init__.py")


def test_every_file_is_loaded_once() -> None:
    code = f"""
import importlib, json, os, sys
from transformers.utils import is_kernels_available
is_kernels_available()
for module in {sorted(sources())!r}:
    importlib.import_module(module)
files = {{name: os.path.realpath(module.__file__) for name, module in list(sys.modules.items())
         if os.path.isabs(getattr(module, "__file__", None) or "")}}
print(json.dumps({{name: file for name, file in files.items() if file.startswith({str(ROOT)!r} + os.sep)}}))
"""
    files = json.loads(python(code, cwd=ROOT).splitlines()[-1])
    own = {name: file for name, file in files.items() if ".venv" not in file}
    assert set(own) >= set(sources()) - {"fxopt.kernels"}
    assert not [file for file, count in Counter(own.values()).items() if count > 1]
    assert not [name for name in own if name.split(".")[0] != "fxopt"]


# Packaging -----------------------------------------------------------------------------------------------------------

SMOKE = """
import sys, torch, fxopt
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=1))
model = fxopt.optimize(model, "bf16")
ids = torch.randint(0, 64, (2, 8))
model(input_ids=ids, labels=ids).loss.backward()
fxopt.optimizer(model, lr=1e-3).step()
print(sorted({name.split(".")[0] for name in fxopt.report(model).hits}))
print(fxopt.__file__)
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel built from the tree, and one built from the sdist of the tree."""
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("tree") / "fxopt"
    skipped = shutil.ignore_patterns(".*", "__pycache__", "runs", "dist", "build", "*.egg-info")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=skipped)
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation"]
    _run([*build, "--wheel", "--outdir", out / "tree", tree], cwd=out)
    _run([*build, "--sdist", "--outdir", out, tree], cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (unpacked,) = (out / "unpacked").iterdir()
    _run([*build, "--wheel", "--outdir", out / "sdist", unpacked], cwd=out)
    (from_tree,), (from_sdist,) = (out / "tree").glob("*.whl"), (out / "sdist").glob("*.whl")
    return from_tree, from_sdist


@pytest.mark.xdist_group("wheel")
def test_wheel_holds_each_file_once(wheels: tuple[Path, Path]) -> None:
    expected = sorted(
        "/".join([*module.split("."), "__init__.py"])
        if path.name == "__init__.py"
        else module.replace(".", "/") + ".py"
        for module, path in sources().items()
    )
    for wheel in wheels:
        names = zipfile.ZipFile(wheel).namelist()
        assert sorted(name for name in names if name.endswith(".py")) == expected, wheel
        assert "fxopt/py.typed" in names
        page = {f"fxopt/inspection/page/{path.name}" for path in (ROOT / "fxopt/inspection/page").iterdir()}
        assert page | {"fxopt/inspection/well_known.json"} <= set(names)
        assert {name.split("/")[0] for name in names} == {"fxopt", f"fxopt-{fxopt.__version__}.dist-info"}


@pytest.mark.xdist_group("wheel")
def test_installed_wheel_trains(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "site"
    _run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheels[0]], cwd=tmp_path)
    *_, hits, file = python(SMOKE, cwd=tmp_path, path=target).splitlines()
    assert file.startswith(str(target))
    assert "rms_norm" in hits


def python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """The standard output of a fresh interpreter that runs ``code`` in ``cwd``, as ``python -c`` does."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return _run([sys.executable, "-c", code], cwd=cwd, env=environment)


def _run(command: list[str | Path], *, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
