"""The record of a GPU on machines that lack something: git, a driver, a home folder, a compiler."""

import os

from bench import gpu_record, gpu_tools


def test_compiled_kernels_are_kept_where_home_cannot_be_written(tmp_path, monkeypatch):
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    gpu_record.keep_compiled_kernels()
    assert "TRITON_CACHE_DIR" not in os.environ
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))  # no folder can be made in it
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # to be forgotten at the end
    del os.environ["TRITON_CACHE_DIR"]
    gpu_record.keep_compiled_kernels()
    assert os.path.isdir(os.environ["TRITON_CACHE_DIR"])
    os.rmdir(os.environ["TRITON_CACHE_DIR"])


def test_a_machine_without_git_or_driver_is_described(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_tools, "TOOLS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    found = gpu_record.machine()
    assert (found["commit"], found["driver"]) == (None, None)
    broken = tmp_path / "nvidia-smi"
    broken.write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    broken.chmod(0o755)
    assert gpu_record.machine()["driver"] is None


def test_what_triton_cannot_build_its_launchers_with(monkeypatch):
    monkeypatch.setenv("CC", "/usr/bin/some-cc")
    monkeypatch.setattr(gpu_record.sysconfig, "get_path", lambda name: "/nowhere")
    assert gpu_record.compiler() == "no /nowhere/Python.h"
    monkeypatch.delenv("CC")
    monkeypatch.setattr(gpu_record.shutil, "which", lambda name: None)
    assert gpu_record.compiler() is None
