"""Fused ops of world-model agents, one per file, each with a plain PyTorch reference, Triton and C++
backends.

Importing this package touches no device, builds nothing and does not load the C++ module; it needs only
torch, and Triton for the `triton` backend.
"""

import importlib

from .dispatch import BackendError, backends_available

_HOME = {
    "Harmonizer": "harmonizer",
    "adam_step": "adam",
    "expand_onehot": "onehot_linear",
    "gather_windows": "gather_windows",
    "harmony_loss": "harmony_loss",
    "image_deconv": "image_deconv",
    "image_input": "image_input",
    "image_loss": "image_loss",
    "kl_balance": "kl_balance",
    "lambda_return": "lambda_return",
    "layer_norm_gru": "layer_norm_gru",
    "layer_norm_silu": "layer_norm_silu",
    "linear": "linear",
    "onehot_linear": "onehot_linear",
    "rssm_observe": "rssm_observe",
    "sample_index": "sample_onehot",
    "sample_onehot": "sample_onehot",
    "strided_conv": "strided_conv",
    "two_hot_loss": "two_hot",
    "two_hot_mean": "two_hot",
}
__all__ = ["BackendError", "backends_available", *_HOME]

# A function named like its file must be bound after the file is loaded: now, not on first use.
for _name, _file in _HOME.items():
    globals()[_name] = getattr(importlib.import_module(f"{__name__}.{_file}"), _name)
