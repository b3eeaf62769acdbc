"""raftdiff aligns generative models with rewards: sample, score, keep the best, fine-tune a LoRA on them, again.

    import raftdiff

    result = raftdiff.align(pipeline, prompts, reward="clip")
    pipeline.load_lora_weights(result.lora_path)

The names below load on first use, so that `import raftdiff` and the command line stay fast.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .best_of_n import best_of as best_of
    from .build import align as align
    from .config import RunConfig as RunConfig
    from .errors import RaftdiffError as RaftdiffError
    from .pipelines.diffusion import DiffusionPolicy as DiffusionPolicy
    from .pipelines.loading import load_lora as load_lora
    from .protocols import Algorithm as Algorithm
    from .protocols import Policy as Policy
    from .protocols import Reward as Reward
    from .rounds import run_rounds as run_rounds
    from .types import Example as Example
    from .types import Group as Group
    from .types import Prompt as Prompt
    from .types import Sample as Sample
    from .types import Scored as Scored

__version__ = "0.1.0"

_MODULES = {
    "Algorithm": "protocols",
    "DiffusionPolicy": "pipelines.diffusion",
    "Example": "types",
    "Group": "types",
    "Policy": "protocols",
    "Prompt": "types",
    "RaftdiffError": "errors",
    "Reward": "protocols",
    "RunConfig": "config",
    "Sample": "types",
    "Scored": "types",
    "align": "build",
    "best_of": "best_of_n",
    "load_lora": "pipelines.loading",
    "run_rounds": "rounds",
}
__all__ = ["__version__", *_MODULES]

# In a checkout, pipelines/, reward_models/ and app/ stand beside this folder; in a wheel they are inside it.
_folder = Path(__file__).resolve().parent
if not (_folder / "pipelines").is_dir() and (_folder.parent / "pyproject.toml").is_file():
    __path__.append(str(_folder.parent))


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
