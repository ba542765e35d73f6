"""What does not belong into a text that others will read: credentials, and who the user is."""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Mapping

_BEGIN, _END = r"(?<![\w.~-])", r"(?=[/\s'\",;:()]|$)"

# Variables that change how a run behaves. The values are shown only of those that can hold no secret.
OF_INTEREST = re.compile(
    r"(AWS|RAY|CUDA|CUBLAS|NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|ELASTIC_LM)_.*|(.*_)?proxy|PYTHONPATH|TMPDIR", re.IGNORECASE
)
SHOWN = re.compile(
    r"(CUDA|CUBLAS|NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|ELASTIC_LM|RAY_TRAIN)_.*"
    r"|RAY_ADDRESS|RAY_AUTH_MODE|RAY_TMPDIR|RAY_USAGE_STATS_ENABLED|TMPDIR|AWS_REGION|AWS_DEFAULT_REGION"
)
SECRET = re.compile(r"key|secret|token|passw|credential", re.IGNORECASE)
SHOWN_CHARACTERS = 60


class Privacy:
    """Masks texts. `home` and `user`: of whoever is to stay unnamed; root is nobody."""

    def __init__(self, home: str, user: str) -> None:
        self._home = home.rstrip("/")
        self._user = "" if user == "root" else user

    @classmethod
    def of_this_user(cls) -> Privacy:
        try:
            user = getpass.getuser()
        except (OSError, KeyError):  # a number without a name, as in some containers
            user = ""
        return cls(os.path.expanduser("~"), user)

    def mask(self, text: str) -> str:
        """`text` without what stands before an @ or behind a ? in addresses, and without the user's folder and name in paths."""
        text = re.sub(r"(^|[\s'\"=]|://)[^/@\s'\"=]+@(?=[\w\[])", r"\1***@", text)
        text = re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1?***", text)
        if self._home:
            text = re.sub(_BEGIN + re.escape(self._home) + _END, "~", text)
        if self._user:
            text = re.sub(rf"(?<=/){re.escape(self._user)}{_END}", "***", text)
        return text


def variables(environment: Mapping[str, str]) -> list[str]:
    """The variables that matter, as `NAME=value`, or `NAME` alone where the value may be a secret."""
    return [
        f"{name}={_shortened(value)}" if SHOWN.fullmatch(name) and not SECRET.search(name) else name
        for name, value in sorted(environment.items())
        if OF_INTEREST.fullmatch(name)
    ]


def _shortened(value: str) -> str:
    shown = value if value.isprintable() else ascii(value)
    return shown if len(shown) <= SHOWN_CHARACTERS else shown[: SHOWN_CHARACTERS - 3] + "..."
