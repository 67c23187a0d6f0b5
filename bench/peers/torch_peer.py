"""What the workers of peers in PyTorch have in common. It runs on a peer's interpreter, which has nothing of ours."""

import itertools
import warnings

import torch
from noise import noise
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from turns import serve


class Counter(TorchDispatchMode):
    """Floating-point operations of matrix products and convolutions.

    PyTorch's own FlopCounterMode counts the same by module, but fails if a module without gradients is given tensors
    with gradients.
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def tensors(settings):
    """The batch of `noise` as float32 on the device, (B, T, ...)."""
    batch = noise(settings["batch"], settings["length"])
    return {key: torch.from_numpy(value).float().to(settings["device"]) for key, value in batch.items()}


def serve_torch(build):
    """Takes turns with an update in PyTorch.

    build: settings -> an update, the modules whose parameters it learns, and the precision of its matrix work.
    """

    def complete(settings):
        warnings.simplefilter("ignore")
        torch.set_num_threads(settings["threads"])
        step, modules, precision = build(settings)

        def update():
            step()
            if settings["device"] == "cuda":
                torch.cuda.synchronize()

        if settings["compile"]:
            gflop = None  # compiled code is not counted
        else:
            with Counter() as counter:
                update()
            gflop = counter.total / 1e9
        parameters = {id(p): p.numel() for p in itertools.chain(*(m.parameters() for m in modules))}
        return update, {
            "precision": precision,
            "on": f"torch {torch.__version__}",
            "threads": torch.get_num_threads(),
            "parameters": sum(parameters.values()),
            "gflop": gflop,
        }

    serve(complete)
