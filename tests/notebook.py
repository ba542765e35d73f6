"""What a notebook's kernel is to us: the shell that rich looks for, and a `display` that keeps what a cell shows."""

from __future__ import annotations

import builtins
import sys
import types
from typing import Any

import pytest


class Notebook:
    """A cell: its outputs as they are now, and how often they were sent."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.num_sent = 0
        self.broken = False

    def display(self, content: Any, *, display_id: bool) -> Any:
        assert display_id is True  # else it could not be replaced
        self.outputs.append(content)
        place = len(self.outputs) - 1
        self._send()
        return types.SimpleNamespace(update=lambda later: (self.outputs.__setitem__(place, later), self._send()))

    def _send(self) -> None:
        if self.broken:
            raise RuntimeError("the kernel's channel is closed")
        self.num_sent += 1

    @property
    def text(self) -> str:
        (output,) = self.outputs
        return repr(output)


def become_a_kernel(patch: pytest.MonkeyPatch) -> Notebook:
    """This process looks like the kernel of a notebook that is returned."""
    cell = Notebook()
    shell = type("ZMQInteractiveShell", (), {})()
    patch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    module = types.ModuleType("IPython.display")
    module.display = cell.display  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    patch.setitem(sys.modules, "IPython.display", module)
    return cell
