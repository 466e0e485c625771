"""How much of the suite a session runs, and where: what the test modules are asked for their contests with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from benchmarks.contest import FULL, QUICK, Pace

__all__ = ["Plan"]

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        mode: "check" (small shapes, no times), "quick" or "full".
        device: "cpu" or "cuda".
        threads: of the processor.
    """

    mode: str
    device: str
    threads: int

    @property
    def pace(self) -> Pace | None:
        return {"check": None, "quick": QUICK, "full": FULL}[self.mode]

    @property
    def backend(self) -> str:
        """Ours for the device."""
        return "triton" if self.device == "cuda" else "cpp"

    def choose(self, check: Thing, quick: Thing, full: Thing) -> Thing:
        return {"check": check, "quick": quick, "full": full}[self.mode]
