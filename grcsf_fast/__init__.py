"""GRCSF: lesion segmentation with global and regional feature compensation."""

from . import functional, reference
from .data.intensities import Intensities
from .data.labels import Labels
from .data.volumes import Preprocessing, VolumeError, load_volume, prepare
from .errors import ArgumentError, ArgumentTypeError, GrcsfError, UnfinishedError
from .evaluation.calcium import agatston
from .evaluation.metrics import evaluate_masks
from .inference.lanes import Failure
from .inference.prediction import Prediction
from .inference.predictor import Predictor
from .inference.record import Done, Failed, Finished
from .inference.report import lesion_mask, lesion_report
from .inference.warm_up import WarmUp, warm_up
from .networks.gcu import GlobalCompensationUnit, compensate
from .networks.grcsf import GRCSF, CompensationMaps
from .networks.mae import MaskedAutoencoder
from .networks.rcu import RegionCompensationUnit
from .networks.residual_maps import residual_maps
from .ops.backends import BackendUnavailableError, backend_info, use_backend
from .ops.vml import resolve_kernels
from .pretrained.bundle import Bundle, BundleError, ResidualMapSettings, load_bundle, save_bundle
from .training.losses import GRCSFLoss

__version__ = "0.2.0"

resolve_kernels()

__all__ = [
    "GRCSF",
    "ArgumentError",
    "ArgumentTypeError",
    "BackendUnavailableError",
    "Bundle",
    "BundleError",
    "CompensationMaps",
    "Done",
    "Failed",
    "Failure",
    "Finished",
    "GRCSFLoss",
    "GlobalCompensationUnit",
    "GrcsfError",
    "Intensities",
    "Labels",
    "MaskedAutoencoder",
    "Prediction",
    "Predictor",
    "Preprocessing",
    "RegionCompensationUnit",
    "ResidualMapSettings",
    "UnfinishedError",
    "VolumeError",
    "WarmUp",
    "__version__",
    "agatston",
    "backend_info",
    "compensate",
    "evaluate_masks",
    "functional",
    "lesion_mask",
    "lesion_report",
    "load_bundle",
    "load_volume",
    "prepare",
    "reference",
    "residual_maps",
    "save_bundle",
    "use_backend",
    "warm_up",
]
