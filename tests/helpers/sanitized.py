"""A pytest plugin of `make sanitize`: the kernels built with sanitizers take the place of the installed ones.

They lie in the folder that $SANITIZED names, build/sanitize if none.
"""

import importlib.util
import os
import sys
from pathlib import Path

built = Path(__file__).parents[2] / os.environ.get("SANITIZED", "build/sanitize")
(library,) = (built / "grcsf_fast/kernels").glob("_cpu*.so")
spec = importlib.util.spec_from_file_location("grcsf_fast.kernels._cpu", library)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules[spec.name] = module
