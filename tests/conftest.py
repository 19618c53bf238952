"""What every test starts from: no network, one thread per worker, GPU tests skipped where there is no GPU."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

# Before transformers and datasets are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and there is none"))


@pytest.fixture(scope="module")  # no longer: while it is open, its event loop runs
def browser() -> Iterator[Any]:
    """A headless Chromium, for the pages that fxopt writes; without one, the tests that ask for it are skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pages are tested through playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium is installed; on Debian: apt install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
