"""What torchrun, deepspeed or SLURM tell a process that they start as one of several ranks."""

from __future__ import annotations

import os

from hybridzoo.errors import ConfigError

# what torchrun and deepspeed set: what srun calls the same
_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}
NAMES = tuple(_SLURM)


def is_launched() -> bool:
    """Whether a launcher started this process as a rank.

    A batch script of SLURM is none, whatever it inherits; the tasks of a step with several are.
    """
    return "RANK" in os.environ or os.environ.get(_SLURM["WORLD_SIZE"], "1") != "1"


def number(name: str) -> int:
    """RANK, WORLD_SIZE or LOCAL_RANK, by whichever name the launcher gave it.

    Raises:
        ConfigError: it is missing or no number.
    """
    found = name if name in os.environ else _SLURM[name]
    text = os.environ.get(found, "")
    if not text.isdecimal():
        raise ConfigError(
            f"parallel: {found} cannot be {text!r}; a launcher sets it to a number. Start with "
            "torchrun, deepspeed or srun."
        )
    return int(text)


def rank() -> int:
    """This process's number among all ranks; 0 in a process of its own."""
    return number("RANK") if is_launched() else 0
