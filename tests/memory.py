"""What a process holds, as Linux counts it."""

from pathlib import Path


class Resident:
    """Resident memory of this process: its peak since the start, above what it was then."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        self.start = self._read("VmRSS")

    def peak(self) -> int:
        return self._read("VmHWM") - self.start

    def _read(self, field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
