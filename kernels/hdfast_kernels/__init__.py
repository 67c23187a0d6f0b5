"""Fused ops of world-model agents, one per file, each with a plain PyTorch reference, Triton and C++
backends.

Importing this package touches no device, builds nothing and does not load the C++ module; it needs only
torch, and Triton for the `triton` backend.
"""

# Most functions are named like their file: `from .linear import linear` binds the function in place of the module.
from .adam import adam_step
from .dispatch import BackendError, backends_available
from .gather_windows import gather_windows
from .harmonizer import Harmonizer
from .harmony_loss import harmony_loss
from .image_deconv import image_deconv
from .image_input import image_input
from .image_loss import image_loss
from .kl_balance import kl_balance
from .lambda_return import lambda_return
from .layer_norm_gru import layer_norm_gru
from .layer_norm_silu import layer_norm_silu
from .linear import linear
from .onehot_linear import expand_onehot, onehot_linear
from .rssm_observe import rssm_observe
from .sample_onehot import sample_index, sample_onehot
from .strided_conv import strided_conv
from .two_hot import two_hot_loss, two_hot_mean

__all__ = [
    "BackendError",
    "Harmonizer",
    "adam_step",
    "backends_available",
    "expand_onehot",
    "gather_windows",
    "harmony_loss",
    "image_deconv",
    "image_input",
    "image_loss",
    "kl_balance",
    "lambda_return",
    "layer_norm_gru",
    "layer_norm_silu",
    "linear",
    "onehot_linear",
    "rssm_observe",
    "sample_index",
    "sample_onehot",
    "strided_conv",
    "two_hot_loss",
    "two_hot_mean",
]
