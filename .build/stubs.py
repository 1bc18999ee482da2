"""Gives the wheel the modules a second time, as their own stubs.

Type checkers take an installed module's types from a package with a `py.typed`, or from a package of stubs (PEP 561); a
module on its own has no place for the first. But a stub may have bodies, so the source itself will do.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsBuildHook(BuildHookInterface[Any]):
    """Adds MODULE-stubs/__init__.pyi for each module."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before the build. An editable installation gets none: there they would be of yesterday."""
        if version == "editable":
            return
        self._folder = tempfile.mkdtemp()
        for module in ("python_docker_mcp", "sandbox_runner"):
            # Copied, because a file of the project that is included elsewhere is left out in its own place.
            copy = shutil.copy(Path(self.root) / f"{module}.py", Path(self._folder) / f"{module}.pyi")
            build_data["force_include"][str(copy)] = f"{module}-stubs/__init__.pyi"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002  # hatchling's
        """After the build."""
        if version != "editable":
            shutil.rmtree(self._folder)
