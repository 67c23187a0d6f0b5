"""What PyTorch is asked to do."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Records in `made` all that PyTorch is asked to do inside the block: (operation, arguments) of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None) -> Any:
        self.made.append((str(function), arguments))
        return function(*arguments, **(options or {}))

    def of(self, operation: str) -> list[tuple[Any, ...]]:
        """The arguments of every call of an aten operation, whichever its overload."""
        return [arguments for name, arguments in self.made if name.split(".")[1] == operation]
