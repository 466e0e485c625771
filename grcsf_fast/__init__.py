"""GRCSF: lesion segmentation with global and regional feature compensation."""

from . import functional, reference
from .inference.lanes import Failure
from .inference.prediction import Prediction
from .inference.predictor import Predictor
from .networks.grcsf import GRCSF, CompensationMaps
from .networks.mae import MaskedAutoencoder
from .networks.residual_maps import residual_maps
from .ops.backends import BackendUnavailableError, backend_info, use_backend
from .ops.vml import resolve_kernels

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
