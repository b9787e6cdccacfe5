"""Held-out bits a byte of a byte model: `python scripts/bench/bits_per_byte.py [MODEL]`."""

import math
import sys

import torch

import hybridzoo
from hybridzoo.parallel.loss import loss
from hybridzoo.tokenizer import load_tokenizer
from hybridzoo.train.data import PackedData

model = hybridzoo.load(sys.argv[1] if len(sys.argv) > 1 else "shakespeare", dtype=torch.float32)
data = PackedData("shakespeare", load_tokenizer("bytes"), seq_len=1024, batch_size=8)
for split in ("val", "test"):
    with torch.no_grad():
        batches = data.eval_batches(split)
        nats = math.fsum(loss(model, batch, 1)[1]["nats"].item() for batch in batches)
    n_bytes = data.documents(split).n_bytes
    print(f"{split}: {nats / math.log(2) / n_bytes:.4f} bits a byte over {n_bytes:,} bytes")
