"""What a row is: its keys with shape and dtype, the check of rows that come in, and their form as bytes.

Axes: N environments, P bytes of a packed row.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from hdfast.envs.base import ArraySpec

SCALAR_KEYS = {"reward": "float32", "is_first": "bool", "is_last": "bool", "is_terminal": "bool"}
STARTS = "starts"  # of sampled windows: the storage rows at which they begin
ALIGNMENT = 16  # bytes; the widest item that torch stores, so that every key can be viewed in place


class RowLayout:
    """The keys of a row, their specs, and the packed form in which rows travel to the log and to the device.

    Packed: one agent step of all N environments as P bytes, key after key, each the C-order bytes of an array
    (N, ...). Keys of wide items come first, so that each starts at a multiple of its item size.

    Raises ValueError if "action" or one of the scalar keys is missing, a scalar key has another shape or dtype, or
    a key has the name of the windows' beginnings, and TypeError for a dtype that torch does not store.
    """

    def __init__(self, specs: Mapping[str, ArraySpec], num_envs: int) -> None:
        self.num_envs = num_envs
        order = sorted(specs, key=lambda key: (-specs[key].dtype.itemsize, key))
        self.specs = {key: specs[key] for key in order}
        if "action" not in specs:
            raise ValueError(f'replay needs the key "action", got {", ".join(specs)}')
        if STARTS in specs:
            raise ValueError(f'replay cannot have a key "{STARTS}": that is where its windows begin')
        for key, dtype in SCALAR_KEYS.items():
            if key not in specs or specs[key].shape != () or specs[key].dtype != dtype:
                raise ValueError(f'replay needs the key "{key}", a {dtype} scalar; got {specs.get(key)}')
        self.torch_dtypes = {key: _torch_dtype(key, spec.dtype) for key, spec in self.specs.items()}
        self.shapes = {key: (num_envs, *spec.shape) for key, spec in self.specs.items()}
        self._slices: dict[str, slice] = {}
        end = 0
        for key, spec in self.specs.items():
            begin, end = end, end + prod(self.shapes[key]) * spec.dtype.itemsize
            self._slices[key] = slice(begin, end)
        self.packed_nbytes = -(-end // ALIGNMENT) * ALIGNMENT

    def check(self, rows: Mapping[str, np.ndarray]) -> None:
        """Raise TypeError or ValueError, in one line, if `rows` are not one row of every environment."""
        if rows.keys() != self.specs.keys():
            missing = sorted(self.specs.keys() - rows.keys())
            unknown = sorted(rows.keys() - self.specs.keys())
            raise ValueError(f"replay row: missing keys {missing}, unknown keys {unknown}")
        for key, spec in self.specs.items():
            spec.check(rows[key], self.num_envs, f'replay row: "{key}"')

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Views (..., N, *shape) of packed rows, uint8 (..., P)."""
        return {
            key: packed[..., self._slices[key]].view(self.torch_dtypes[key]).unflatten(-1, self.shapes[key])
            for key in self.specs
        }

    def to_json(self) -> dict[str, object]:
        """A description that is equal for two replays of the same kind of rows."""
        keys = {key: [spec.dtype.str, *spec.shape] for key, spec in self.specs.items()}
        return {"num_envs": self.num_envs, "keys": keys}

    @classmethod
    def from_json(cls, layout: Mapping[str, Any]) -> Self:
        """The layout that `to_json` describes."""
        keys = {
            key: ArraySpec(tuple(shape), np.dtype(dtype)) for key, (dtype, *shape) in layout["keys"].items()
        }
        return cls(keys, layout["num_envs"])


def _torch_dtype(key: str, dtype: np.dtype) -> torch.dtype:
    try:
        return torch.from_numpy(np.empty(0, dtype)).dtype
    except TypeError:
        raise TypeError(f'replay key "{key}": torch does not store {dtype}') from None
