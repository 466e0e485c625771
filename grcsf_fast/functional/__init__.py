"""The two ops as users call them: arguments checked, shapes documented, the backend chosen from the tensors.

Tensors of subclasses, such as MONAI's MetaTensor, are served as by PyTorch's own functions: the subclass decides what
comes back, which for a MetaTensor is a MetaTensor with the first one's metadata.
"""

from .attention import AttentionWeights, patch_cross_attention
from .compensation import global_compensation, multiscale_compensation

__all__ = ["AttentionWeights", "global_compensation", "multiscale_compensation", "patch_cross_attention"]
