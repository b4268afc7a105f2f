"""erd-fast: a fast training engine for diffusion transformers on image latents, with the ERD loss weighting.

Importing this package is light: no compiled code, no Triton, no GPU. Names below load their module at first use.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erd_fast.diffusion import get_schedule, loss_weight, weight_table
    from erd_fast.ops import autotune, explain, record, use_backend

__version__ = "0.1.0"

# In a source checkout the Triton kernels lie in ../kernels; an installed wheel has them in erd_fast/kernels.
_root = Path(__file__).resolve().parent.parent
if (_root / "csrc").is_dir() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

_EXPORTS = {
    "autotune": "erd_fast.ops",
    "explain": "erd_fast.ops",
    "get_schedule": "erd_fast.diffusion",
    "loss_weight": "erd_fast.diffusion",
    "record": "erd_fast.ops",
    "use_backend": "erd_fast.ops",
    "weight_table": "erd_fast.diffusion",
}
__all__ = [
    "__version__",
    "autotune",
    "explain",
    "get_schedule",
    "loss_weight",
    "record",
    "use_backend",
    "weight_table",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
