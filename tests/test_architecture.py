"""Architecture: imports point one way, importing does nothing, and no file contains a path of this machine."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOORS = ("train", "evaluate", "report", "sweep", "profile", "tune")

# Which module may import which; a name covers everything below it. The first line that covers a module applies.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "hdfast_kernels": ("hdfast_kernels",),
    "hdfast.runtime.device": ("hdfast.runtime.errors", "hdfast_kernels"),
    "hdfast.runtime": ("hdfast.runtime",),
    "hdfast.suites": ("hdfast.aggregates", "hdfast.runtime.errors"),
    "hdfast.config": (
        "hdfast.suites",
        "hdfast.flags",
        "hdfast.overrides",
        "hdfast.sections",
        "hdfast.sizes",
        "hdfast.config_file",
        "hdfast.runtime.errors",
        "hdfast.runtime.files",
    ),
    "hdfast.sections": ("hdfast.overrides",),
    "hdfast.sizes": ("hdfast.runtime.errors",),
    "hdfast.config_file": ("hdfast.runtime.errors",),
    "hdfast.overrides": ("hdfast.runtime.errors",),
    "hdfast.flags": ("hdfast.usage", "hdfast.runtime.arguments", "hdfast.runtime.errors"),
    "hdfast.usage": (),
    "hdfast.envs": ("hdfast.envs", "hdfast.suites", "hdfast.runtime.errors", "hdfast.runtime.signals"),
    "hdfast.replay": ("hdfast.replay", "hdfast.envs.base", "hdfast.runtime", "hdfast_kernels"),
    "hdfast.agent": ("hdfast.agent", "hdfast.config", "hdfast.envs.base", "hdfast.runtime", "hdfast_kernels"),
    "hdfast.tuning": (
        "hdfast.tuning",
        "hdfast.agent",
        "hdfast.replay",
        "hdfast.config",
        "hdfast.envs.base",
        "hdfast.runtime",
        "hdfast_kernels",
    ),
    "hdfast.tables": ("hdfast.suites",),
    "hdfast.results": ("hdfast.config", "hdfast.loop", "hdfast.runtime", "hdfast.suites", "hdfast.tables"),
    "hdfast.plots": ("hdfast.tables",),
    "hdfast.variants": ("hdfast.config", "hdfast.flags", "hdfast.runtime.errors"),
    **{f"hdfast.{door}": ("hdfast", "hdfast_kernels") for door in DOORS},
    "hdfast": (  # the loop and the rest, except the commands
        *(
            f"hdfast.{part}"
            for part in (
                "agent",
                "advice",
                "config",
                "envs",
                "evaluation",
                "flags",
                "init_from",
                "loop",
                "overrides",
                "replay",
                "runtime",
                "sections",
                "session",
                "streams",
                "suites",
                "tuning",
            )
        ),
        "hdfast_kernels",
    ),
}
# Imported only inside functions that need them: they may be missing, or are slow to load.
LAZY = {"envpool", "ale_py", "mujoco", "dm_control", "metaworld", "ray", "tensorboard", "nvtx", "tyro"}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of both packages."""
    found = {}
    for base, package in ((ROOT, "hdfast"), (ROOT / "kernels", "hdfast_kernels")):
        for path in (base / package).rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, *, deferred: bool = True) -> Iterator[str]:
    """Dotted names a module imports, relative ones resolved; `deferred` includes those inside functions."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.Import(names=names):
                    yield from (alias.name for alias in names)
                case ast.ImportFrom(module=module, names=names, level=level):
                    if level:
                        parts = package.split(".")
                        module = ".".join([*parts[: len(parts) + 1 - level], *([module] if module else [])])
                    # `from package import module` imports the module.
                    for alias in names:
                        full = f"{module}.{alias.name}"
                        yield full if full in MODULES else module
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() if not deferred:
                    continue
                case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                    continue  # for the type checker alone
                case _:
                    yield from visit(child)

    yield from visit(ast.parse(MODULES[name].read_text()))


def covers(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def test_both_packages_are_found():
    assert {"hdfast", "hdfast.loop", "hdfast.agent.rssm", "hdfast_kernels.dispatch"} <= MODULES.keys()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert "hdfast.runtime.errors" in set(imports("hdfast.config"))
    assert "hdfast_kernels.dispatch" in set(imports("hdfast_kernels.two_hot"))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name):
    layer = next(layer for layer in MAY_IMPORT if covers(layer, name))
    ours = {found for found in imports(name) if covers("hdfast", found) or covers("hdfast_kernels", found)}
    if layer != "hdfast_kernels":
        ours.discard("hdfast")  # for its version
    wrong = [found for found in ours if not any(covers(allowed, found) for allowed in MAY_IMPORT[layer])]
    assert not wrong, f"{name} ({layer}) imports {wrong}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_what_not_everybody_has_is_imported_where_it_is_needed(name):
    assert not LAZY & {found.partition(".")[0] for found in imports(name, deferred=False)}


def test_the_kernels_need_only_torch_and_triton():
    own = sys.stdlib_module_names | {"hdfast_kernels", "torch", "triton"}
    for name in MODULES:
        if covers("hdfast_kernels", name):
            assert {found.partition(".")[0] for found in imports(name)} <= own, name


QUIET = """
import importlib, os, sys, threading
import numpy, torch

written = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(arguments[0])
sys.addaudithook(watch)

def touched(*arguments, **keywords):
    raise AssertionError("importing asks for a device")
for question in ("is_available", "device_count", "current_device", "get_device_capability", "_lazy_init"):
    setattr(torch.cuda, question, touched)
threads = threading.active_count()
for module in sys.argv[1:]:
    importlib.import_module(module)
    assert not written, written
    assert threading.active_count() == threads
    print(module, *sys.modules)
"""


def test_importing_loads_no_source_and_touches_nothing():
    modules = ["hdfast_kernels", "hdfast", "hdfast.envs", *(f"hdfast.{door}" for door in DOORS)]
    command = [sys.executable, "-B", "-W", "ignore", "-c", QUIET, *modules]
    path = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    loaded = {words[0]: set(words[1:]) for words in map(str.split, result.stdout.splitlines())}
    assert list(loaded) == modules
    for module, others in loaded.items():
        assert module in others
        assert not others & (LAZY | {"hdfast_kernels._native"}), module
    assert not {name for name in loaded["hdfast_kernels"] if covers("hdfast", name)}


def test_no_file_knows_this_machine():
    """No path of the machine it was written on: neither this one's nor those of the usual home folders."""
    places = {ROOT, Path.home()} | ({Path(sys.prefix)} if sys.prefix != sys.base_prefix else set())
    own = [re.escape(f"{path}/"[1:]) for path in places if len(path.parts) > 1]
    starts = "|".join([*own, "(?:work|root|home|Users)/"])
    pattern = re.compile(rf"(?<![\w./])/(?:{starts})[\w.]")
    folders = ("hdfast", "kernels", "tests", "bench", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".txt", ".cfg"}]
    suffixes = {"", ".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".cpp", ".h", ".cu", ".yml", ".yaml"}
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts
        for match in pattern.finditer(path.read_text(errors="replace"))
    ]
    assert not found


@pytest.mark.parametrize(
    "command", [["check", "--no-cache"], ["format", "--check", "--no-cache"]], ids=lambda c: c[0]
)
def test_ruff_has_nothing_to_say(command):
    pytest.importorskip("ruff")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_has_nothing_to_say(tmp_path):
    pytest.importorskip("mypy")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
