"""The model sizes: the fields of a configuration that `--size` sets."""

from typing import Any

from hdfast.runtime.errors import ConfigError, suggest

# deter, units, depth, layers (HarmonyDream's Atari-100k model is `small`; DreamerV3, table B.1 for the larger ones).
_WIDTHS: dict[str, tuple[int, int, int, int]] = {
    "small": (512, 512, 32, 2),
    "medium": (1024, 640, 48, 3),
    "large": (2048, 768, 64, 4),
    "xlarge": (4096, 1024, 96, 5),
}

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "rssm": {"deter": 64, "units": 64, "stoch": 8, "classes": 8},
        "network": {"units": 64, "layers": 1, "depth": 16, "mlp_layers": 2, "mlp_units": 64, "bins": 63},
    },
    **{
        name: {
            "rssm": {"deter": deter, "units": units},
            "network": {"units": units, "layers": layers, "depth": depth},
        }
        for name, (deter, units, depth, layers) in _WIDTHS.items()
    },
}


def widths(size: str) -> dict[str, Any]:
    """The nested fields that a size sets. Raises: ConfigError naming the nearest size."""
    if size not in SIZES:
        raise ConfigError(f"--size: no size {size!r}{suggest(size, SIZES)}")
    return SIZES[size]
