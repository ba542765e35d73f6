"""The environment of the harness's process: what it needs to start and to find its data, and nothing else of ours.

Invariant: no variable that a task of the harness reads for itself (COUNTRY, MODEL_NAME, ...) comes in from ours and changes a
figure, no secret but Hugging Face's goes out, and it is offline where we are. It sees no GPU: somebody may train there.
"""

from __future__ import annotations

from collections.abc import Mapping

NAMES = frozenset(
    {
        *("PATH", "LD_LIBRARY_PATH", "HOME", "USER", "LOGNAME", "TMPDIR"),
        *("PYTHONUSERBASE", "PYTHONNOUSERSITE", "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
        *("NLTK_DATA", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE"),
    }
)
PREFIXES = ("HF_", "XDG_", "LMEVAL_", "LM_HARNESS_")
PROXIES = frozenset({"http_proxy", "https_proxy", "all_proxy", "no_proxy"})  # also in capitals
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_EVALUATE_OFFLINE")
TRUE = frozenset({"1", "ON", "YES", "TRUE"})  # as Hugging Face's libraries read them


def environment(ours: Mapping[str, str], threads: int) -> dict[str, str]:
    """`threads`: those of the run. Texts are read as UTF-8, and its resampling stays in one process."""
    kept = {name: value for name, value in ours.items() if _is_kept(name)}
    if any(ours.get(name, "").upper() in TRUE for name in OFFLINE):
        kept |= dict.fromkeys(OFFLINE, "1")
    fixed = {
        "LC_ALL": "C.UTF-8",
        "PYTHONUTF8": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "DISABLE_MULTIPROC": "1",
    }
    return kept | fixed


def _is_kept(name: str) -> bool:
    return name in NAMES or name.startswith(PREFIXES) or name.lower() in PROXIES
