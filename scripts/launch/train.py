"""`hybridzoo train` under a launcher: `deepspeed` and `torchrun` start this file once a rank.

deepspeed --num_gpus 2 scripts/launch/train.py recipe.yaml [--resume] [--output DIR] [--debug]
torchrun --nproc-per-node 2 scripts/launch/train.py recipe.yaml [--resume] ...
"""

import sys

from hybridzoo.cli import main

if __name__ == "__main__":
    # the launcher says it in LOCAL_RANK too
    given = [a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank"))]
    main(["train", *given])
