"""Other people's programs that `bench.peers` can time, and what each of them needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Checkout:
    """A public repository at the commit whose programs the workers know how to call."""

    url: str
    commit: str

    @property
    def name(self) -> str:
        """What `git clone` calls its folder."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Peer:
    """A program, the worker that makes it do an update, and what both need to run.

    worker: a script beside this file.
    packages: what pip installs; {torch} stands for our version of it, {cuda} for JAX's extra for CUDA.
    precisions: those that it can be told to use, besides its own default.
    checkout: the repository that it is imported from, by way of its folders `paths`; None: it is a package.
    environment: the folder of its interpreter, shared by peers with the same packages; "" for its name.
    options: more settings of its worker.
    """

    name: str
    about: str
    worker: str
    packages: tuple[str, ...]
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    checkout: Checkout | None = None
    paths: tuple[str, ...] = (".",)
    environment: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """The commit, or the version of the package."""
        return self.checkout.commit[:7] if self.checkout else self.packages[0].partition("==")[2]


HARMONYDREAM = Checkout("https://github.com/thuml/HarmonyDream", "0a22e33fb47489361a9f239867a1cf34b958b320")
R2DREAMER = Checkout("https://github.com/NM512/r2dreamer", "546e4fab8146ea4b14e1d7726bbc1a8a1d50322f")
JAX = ("jax{cuda}==0.4.33", "numpy<2", "ruamel.yaml")
R2DREAMER_PACKAGES = ("torch=={torch}", "numpy", "tensordict", "hydra-core", "tensorboard")

PEERS = (
    Peer(
        "sheeprl",
        "sheeprl's DreamerV3 in PyTorch",
        "sheeprl_update.py",
        ("sheeprl==0.8.4", "torch=={torch}"),
    ),
    Peer(
        "harmonydream-torch",
        "the HarmonyDream authors' PyTorch program; its encoder's convolutions do not widen",
        "harmonydream_torch_update.py",
        ("torch=={torch}", "numpy", "torchtyping", "typeguard<3", "ruamel.yaml"),
        precisions=("float32",),
        checkout=HARMONYDREAM,
        paths=("wmlib-torch",),
    ),
    Peer(
        "harmonydream-jax",
        "the HarmonyDream authors' JAX program of Atari 100k",
        "harmonydream_jax_update.py",
        (*JAX, "optax==0.1.7", "tensorflow-probability==0.24.0", "cloudpickle"),
        checkout=HARMONYDREAM,
        paths=("dreamerv3-jax", "dreamerv3-jax/dreamerv3"),
    ),
    Peer(
        "dreamerv3-torch",
        "NM512's DreamerV3 in PyTorch",
        "dreamerv3_torch_update.py",
        ("torch=={torch}", "numpy", "gym==0.26.2", "tensorboard", "ruamel.yaml"),
        precisions=("float32",),
        checkout=Checkout(
            "https://github.com/NM512/dreamerv3-torch", "6ef8646d807cd10ce0c88e10a7e943211e7fc44c"
        ),
    ),
    Peer(
        "r2dreamer",
        "NM512's later agent without a decoder, another architecture",
        "r2dreamer_update.py",
        R2DREAMER_PACKAGES,
        checkout=R2DREAMER,
        environment="r2dreamer",
        options={"rep_loss": "r2dreamer"},
    ),
    Peer(
        "r2dreamer-decoder",
        "the same with its decoder",
        "r2dreamer_update.py",
        R2DREAMER_PACKAGES,
        checkout=R2DREAMER,
        environment="r2dreamer",
        options={"rep_loss": "dreamer"},
    ),
    Peer(
        "dreamerv3",
        "danijar's DreamerV3 in JAX, the same other architecture with a decoder",
        "dreamerv3_update.py",
        (*JAX, "chex", "einops", "elements>=3.19.1", "ninjax>=3.5.1", "optax", "portal>=3.5.0"),
        checkout=Checkout("https://github.com/danijar/dreamerv3", "e3f02248693a79dc8b0ebd62c93683888ddaccfe"),
    ),
)
