"""The table of tolerances, which the check of a kernel's first use shares (:mod:`grcsf_fast.ops.tolerances`)."""

from grcsf_fast.ops.tolerances import TOLERANCES, tolerance

__all__ = ["TOLERANCES", "tolerance"]
