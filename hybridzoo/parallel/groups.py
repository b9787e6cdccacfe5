"""Process groups from what torchrun, deepspeed or SLURM started."""
