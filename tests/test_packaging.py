"""Packaging: dependencies that are declared and used, one version, README's commands, the C++ module."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import hdfast
import hdfast_kernels
from hdfast_kernels import dispatch

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Distribution -> the name it is imported by, if that is not its name in lower case.
IMPORTED_AS = {"pillow": "PIL", "ale-py": "ale_py"}
# Used without an import: pytest's plugins, the linters, and a dependency of dm_control whose version must be ours.
NOT_IMPORTED = {"pytest-benchmark", "pytest-xdist", "ruff", "mypy", "mujoco"}
# Calls that import a module by its name, or find it.
DEFERRED = {"importlib.import_module", "importlib.util.find_spec", "load"}


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}


DEPENDENCIES = PROJECT["project"]["dependencies"]
EXTRAS = PROJECT["project"]["optional-dependencies"]


def imports_of(*folders: str) -> set[str]:
    """Top-level names imported anywhere in the Python files of these folders."""
    found = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found.add(node.module.partition(".")[0])
                elif isinstance(node, ast.Call) and ast.unparse(node.func) in DEFERRED:
                    found |= {
                        arg.value.partition(".")[0] for arg in node.args if isinstance(arg, ast.Constant)
                    }
    return found - sys.stdlib_module_names


def modules(requirements: list[str]) -> set[str]:
    return {IMPORTED_AS.get(name, name) for name in names(requirements) - NOT_IMPORTED}


def test_what_the_package_imports_is_declared():
    optional = modules([requirement for extra in EXTRAS.values() for requirement in extra])
    ours = {"hdfast", "hdfast_kernels"}
    optional_parts = {"nvtx"}  # named in an error message where they are missing
    missing = imports_of("hdfast", "kernels") - modules(DEPENDENCIES) - optional - ours - optional_parts
    assert not missing


def test_every_dependency_is_used():
    assert modules(DEPENDENCIES) <= imports_of("hdfast", "kernels")
    assert modules(EXTRAS["dev"]) <= imports_of("hdfast", "kernels", "tests", "bench")
    assert modules(EXTRAS["cluster"]) <= imports_of("hdfast")


def test_every_dependency_of_a_run_is_bounded():
    for requirement in [*DEPENDENCIES, *EXTRAS["dmc"], *EXTRAS["cluster"]]:
        assert "<" in requirement or "==" in requirement, requirement


def test_no_address_of_a_registry_is_committed():
    text = (
        (ROOT / "pyproject.toml").read_text()
        + (ROOT / "README.md").read_text()
        + (ROOT / ".ci/run").read_text()
    )
    assert not re.search(r"index-url|extra-index|find-links|https?://[^ )]*(pypi|simple)", text)


def test_one_version():
    try:
        installed = importlib.metadata.version("hdfast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("hdfast runs from its checkout, not installed")
    assert installed == hdfast.__version__


def test_editors_and_type_checkers_see_the_ops():
    """They read imports, and run nothing; of a package without py.typed they ignore all types."""
    assert (ROOT / "hdfast/py.typed").exists()
    assert (ROOT / "kernels/hdfast_kernels/py.typed").exists()
    tree = ast.parse(Path(hdfast_kernels.__file__).read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(hdfast_kernels.__all__)
    assert not any(isinstance(getattr(hdfast_kernels, name), types.ModuleType) for name in imported)


def test_ci_runs_the_test_command_of_the_readme():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv ")]
    assert len(commands) == 2
    train, test = commands
    assert train.endswith("python -m hdfast.train --suite atari100k")
    pattern = re.search(r"grep -m 1 -E '([^']+)' README.md", script.read_text())[1]
    assert [line for line in lines if re.search(pattern, line)] == [test]


def test_the_cpp_module_is_built():
    """Without it the tests of the native backend would be skipped, and the defaults untested."""
    assert dispatch.native_built(), f"build it with `{dispatch.BUILD_COMMAND}`"
