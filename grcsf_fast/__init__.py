"""GRCSF: lesion segmentation with global and regional feature compensation."""

from . import functional, reference
from .lanes import Failure
from .networks.grcsf import GRCSF, CompensationMaps
from .networks.mae import MaskedAutoencoder
from .ops.backends import BackendUnavailableError, backend_info, use_backend
from .ops.vml import resolve_kernels
from .predict import Prediction, Predictor
from .residuals import residual_maps

__version__ = "0.1.0"

resolve_kernels()

__all__ = [
    "GRCSF",
    "BackendUnavailableError",
    "CompensationMaps",
    "Failure",
    "MaskedAutoencoder",
    "Prediction",
    "Predictor",
    "__version__",
    "backend_info",
    "functional",
    "reference",
    "residual_maps",
    "use_backend",
]
