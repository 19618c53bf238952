"""What is saved over an existing file takes its place whole, or leaves it as it was."""

import resource
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.atomic_file import write, write_text
from fxopt.diagnosis.check import Diagnosis
from fxopt.inspection.diff import Conditions, GraphDiff
from fxopt.planning.plan import Plan


def saved_things() -> dict[str, Any]:
    plan = Plan("m", 1, 1, 1, 1, False, (), None, "nothing fits")
    diff = GraphDiff("m", "bf16", Conditions(1, 1, True, False, 1, 1, {}), (), {}, {})
    monitor = fxopt.monitor(torch.optim.SGD(nn.Linear(1, 1).parameters()))
    policy = fxopt.Policy.named("bf16")
    found = {"policy.json": policy, "policy.yaml": policy, "diagnosis.json": Diagnosis("1", "cpu", ())}
    found |= dict.fromkeys(("plan.json", "plan.html", "plan.txt"), plan)
    found |= dict.fromkeys(("diff.json", "diff.html", "diff.txt", "diff.graphml", "d.model-explorer.json"), diff)
    return found | {"monitor.json": monitor}


@pytest.mark.parametrize("name", saved_things())
def test_a_save_that_fails_leaves_what_was_there(name: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that is full: both end a write in the middle."""
    path, thing = tmp_path / name, saved_things()[name]
    path.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            thing.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "before" and [other.name for other in tmp_path.iterdir()] == [name]
    thing.save(path)
    assert len(path.read_bytes()) > 8


def test_a_plot_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    monitor = fxopt.monitor(torch.optim.SGD(nn.Linear(1, 1).parameters()))
    monitor.plot(tmp_path / "monitor")
    path = tmp_path / "monitor.png"
    before = path.read_bytes()

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure.Figure, "savefig", fails)
        with pytest.raises(OSError, match="no space"):
            monitor.plot(path)
    assert path.read_bytes() == before and before.startswith(b"\x89PNG")


def test_links_permissions_and_devices_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "file.json", tmp_path / "link.json"
    path.write_text("before")
    path.chmod(0o640)
    link.symlink_to(path)
    assert write_text(link, "é") == link
    assert link.is_symlink() and path.read_bytes() == "é".encode() and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert write_text("/dev/null", "nothing") == Path("/dev/null") and not Path("/dev/null").is_file()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_nothing_behind(interruption: type[BaseException], tmp_path: Path) -> None:
    def stop(file: Any) -> None:
        file.write(b"half")
        raise interruption

    with pytest.raises(interruption):
        write(tmp_path / "file", stop)
    assert not list(tmp_path.iterdir())
