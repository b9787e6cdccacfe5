"""hybridzoo: hybrid language models written as one line of layer letters.

The names below are loaded when first used, so that `import hybridzoo` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridzoo.config import HybridConfig
    from hybridzoo.inference.generate import generate
    from hybridzoo.model import HybridLM
    from hybridzoo.zoo import list_models, load

__version__ = "0.1.0"
__all__ = ["HybridConfig", "HybridLM", "__version__", "generate", "list_models", "load"]

_HOMES = {
    "HybridConfig": "hybridzoo.config",
    "HybridLM": "hybridzoo.model",
    "generate": "hybridzoo.inference.generate",
    "list_models": "hybridzoo.zoo",
    "load": "hybridzoo.zoo",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
