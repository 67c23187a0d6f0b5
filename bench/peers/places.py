"""Where peers live: an interpreter with the packages that a peer needs, and the checkout it is imported from."""

import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.peers.known import Checkout, Peer
from hdfast.runtime.errors import MissingLibraryError


@dataclass(frozen=True)
class Program:
    """What is started: the command of a worker, its environment variables (None: ours), and settings of its own."""

    name: str
    command: list[str]
    version: str
    variables: Mapping[str, str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of a command's output that begins with ERROR, or else its last line."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no word"
    )


def requirements(peer: Peer, device: str) -> list[str]:
    """What pip is told to install for it: the torch that runs ours, or the JAX of the device."""
    version = torch.__version__.partition("+")[0]
    cuda = "[cuda12]" if device == "cuda" else ""
    return [package.format(torch=version, cuda=cuda) for package in peer.packages]


def interpreter(folder: Path, packages: Sequence[str], name: str) -> Path:
    """The Python of an environment for which exactly these packages were asked; made if it does not exist yet.

    Raises: MissingLibraryError if the environment cannot be made or pip fails, with pip's message.
    """
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(packages) + "\n"
    if python.exists() and installed.exists() and installed.read_text() == wanted:
        return python
    print(f"installing {', '.join(packages)} into {folder.name}", file=sys.stderr, flush=True)
    hint = "it needs pip, an index that has them, and a Python that they are built for"
    try:
        venv.EnvBuilder(clear=True, with_pip=True).create(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingLibraryError(f"no environment for it: {error}", where=name, hint=hint) from error
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MissingLibraryError(f"cannot be installed: {said(done)}", where=name, hint=hint)
    installed.write_text(wanted)  # last: an environment that is not complete is made anew
    return python


def checked_out(checkout: Checkout, folder: Path, name: str) -> Path:
    """The folder, if it is a clone of the repository at that commit.

    Raises: MissingLibraryError with the commands that make it one.
    """
    switch = f"git -C {folder} checkout {checkout.commit}"
    if not (folder / ".git").exists():  # git would search further up, and find ours
        raise MissingLibraryError(
            "no checkout of it", where=name, hint=f"git clone {checkout.url} {folder} && {switch}"
        )
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    if done.stdout.strip() != checkout.commit:
        what = said(done) if done.returncode else f"at commit {done.stdout.strip()}"
        raise MissingLibraryError(
            f"its checkout is not the one that is timed: {what}", where=name, hint=switch
        )
    return folder


def installed_here(peer: Peer) -> str:
    """The version of a peer on this interpreter: that of its package, or the commit of its checkout.

    Raises: MissingLibraryError if it has no such package.
    """
    package = peer.packages[0].partition("==")[0]
    try:
        return peer.version if peer.checkout else metadata.version(package)
    except metadata.PackageNotFoundError as error:
        hint = "leave out --here to have it installed beside"
        raise MissingLibraryError("it is not installed here", where=peer.name, hint=hint) from error


def program(peer: Peer, place: Path, checkouts: Path, device: str, *, here: bool = False) -> Program:
    """The program of a peer, with an interpreter below `place`, on which what it needs is installed.

    here: use this interpreter and the packages it has; nothing is installed.

    Raises: MissingLibraryError if it cannot be installed, is not installed here, or has no checkout.
    """
    variables, version = dict(os.environ), installed_here(peer) if here else peer.version
    if not here:  # all its packages are to come from its own environment
        variables.pop("PYTHONPATH", None)
    if peer.checkout:
        folder = checked_out(peer.checkout, checkouts / peer.checkout.name, peer.name)
        places = [str((folder / path).resolve()) for path in peer.paths]
        places += filter(None, [variables.get("PYTHONPATH")])
        variables["PYTHONPATH"] = os.pathsep.join(places)
    python = (
        sys.executable
        if here
        else interpreter(place / (peer.environment or peer.name), requirements(peer, device), peer.name)
    )
    command = [str(python), str(Path(__file__).with_name(peer.worker))]
    return Program(peer.name, command, version, variables, peer.options)
