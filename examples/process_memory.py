"""Peak memory of the running process (or of its GPU) over a stretch of code."""

import gc
import threading
import time
from types import TracebackType

import psutil
import torch


def resident_bytes() -> int:
    """Memory that this process holds now: on the GPU where there is one, else its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """Measures the highest ``resident_bytes`` between enter and exit, in ``peak_bytes``.

    Linux keeps the figure itself (VmHWM) and lets a process start it anew; elsewhere a thread samples every 5 ms.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._sampler: threading.Thread | None = None
        self._stop = threading.Event()

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif not _restart_high_water_mark():
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated()
        elif self._sampler is None:
            self.peak_bytes = _high_water_mark() or 0
        else:
            self._stop.set()
            self._sampler.join()

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.peak_bytes = max(self.peak_bytes, resident_bytes())
            time.sleep(0.005)


def _high_water_mark() -> int | None:
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _restart_high_water_mark() -> bool:
    """Sets VmHWM to the present resident set; False where the system cannot."""
    try:
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")
    except OSError:
        return False
    mark = _high_water_mark()
    return mark is not None and mark <= resident_bytes() * 1.05
