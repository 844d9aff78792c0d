"""Builds a wheel whose data plane is compiled: with HATCH_BUILD_HOOKS_ENABLE=1, by mypyc and a C compiler.

Which modules is said in pyproject.toml. They are compiled as they are, in a copy of the tree: the tree itself stays
pure Python, and every module's source is in the wheel beside its compiled form.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SLICES = """
#include <Python.h>
static inline PyObject *burstgate_bytes(const char *start, Py_ssize_t size) {
    return PyBytes_FromStringAndSize(start, size < 0 ? 0 : size);
}
#define PyBytes_FromStringAndSize burstgate_bytes
"""
"""mypyc (2.4) raises SystemError for a slice of bytes that ends before it starts; in Python it is empty."""


class CompiledHook(BuildHookInterface):  # type: ignore[type-arg]
    """hatchling's custom build hook."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and add what that gives to the wheel. Raises RuntimeError with the compiler's words."""
        if version == "editable":
            return
        root = Path(self.root)
        self._folder = Path(tempfile.mkdtemp())
        for package in self.build_config.packages:
            shutil.copytree(root / package, self._folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        # Under a name that mypy reads and setuptools does not.
        shutil.copy(root / "pyproject.toml", self._folder / "mypy.toml")
        header = self._folder / "slices.h"
        header.write_text(_SLICES)
        flags = f"{os.environ.get('CFLAGS', '')} -include {header}"
        ran = subprocess.run(
            [sys.executable, "-m", "mypyc", "--config-file=mypy.toml", *self.config["modules"]],
            cwd=self._folder,
            env={**os.environ, "MYPYC_OPT_LEVEL": "3", "CFLAGS": flags},
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            raise RuntimeError(f"mypyc failed with status {ran.returncode}:\n{ran.stdout}{ran.stderr}")
        for built in self._folder.rglob("*.so"):
            where = built.relative_to(self._folder)
            if where.parts[0] != "build":
                build_data["force_include"][str(built)] = str(where)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Take the copy away."""
        if version != "editable":
            shutil.rmtree(self._folder)
