"""The example that inspects runs, and writes what it says."""

from pathlib import Path

from tests.examples.test_demo import run


def test_inspect(tmp_path: Path) -> None:
    done = run("examples/03_inspect.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "@@ transformers/models/llama/modeling_llama.py" in done.stdout
    written = [Path(line.removeprefix("wrote ")) for line in done.stdout.splitlines() if line.startswith("wrote ")]
    assert len(written) == 5 and all(path.stat().st_size > 1000 for path in written)
