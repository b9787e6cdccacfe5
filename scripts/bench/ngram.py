"""What the embedded model has to beat: xz, bz2 and a byte n-gram on the shakespeare corpus.

    python scripts/bench/ngram.py

Bits per byte of the val and test splits given the train split. The n-gram is the interpolated
Witten-Bell one (Bell, Cleary and Witten, Text Compression, 1990, method C):
p_k(c | h) = (n(h c) + t(h) p_{k-1}(c | h')) / (n(h) + t(h)), t(h) = distinct bytes after h, and
p_0 is 1 / 256. "Order" is the number of bytes of context.
"""

import bz2
import lzma
import math
import sys

import numpy as np

from hybridzoo.train.data import corpus

ORDERS = (2, 3, 4, 5, 6)


def compressed_bpb(compress, train: bytes, held_out: bytes) -> float:
    """Bits a byte of `held_out` when its compressor has just read `train`."""
    return 8 * (len(compress(train + held_out)) - len(compress(train))) / len(held_out)


def grams(documents: list[bytes], order: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each byte: context and byte as one int64 key, and whether its document has the context."""
    keys, is_whole = [], []
    for document in documents:
        text = np.frombuffer(document, np.uint8).astype(np.int64)
        key = text.copy()
        for back in range(1, order + 1):
            key[back:] += text[:-back] << 8 * back
        keys.append(key)
        is_whole.append(np.arange(len(text)) >= order)
    return np.concatenate(keys), np.concatenate(is_whole)


def lookup(sorted_keys: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Value of each key, 0 for keys that are not there."""
    at = np.searchsorted(sorted_keys, keys).clip(max=len(sorted_keys) - 1)
    return np.where(sorted_keys[at] == keys, values[at], 0)


def ngram_bpb(train: list[bytes], held_out: list[bytes], max_order: int) -> list[float]:
    """Bits a byte for each order from 0 to max_order."""
    p = np.full(sum(map(len, held_out)), 1 / 256)
    result = []
    for order in range(max_order + 1):
        keys, is_whole = grams(train, order)
        seen, counts = np.unique(keys[is_whole], return_counts=True)
        contexts, first, types = np.unique(seen >> 8, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        keys, is_whole = grams(held_out, order)
        n_gram = lookup(seen, counts, keys)
        n, t = lookup(contexts, totals, keys >> 8), lookup(contexts, types, keys >> 8)
        # a context never seen, or cut by the document's start, leaves the shorter one's answer
        known = is_whole & (n > 0)
        p = np.where(known, (n_gram + t * p) / np.where(known, n + t, 1), p)
        result.append(-float(np.log(p).mean()) / math.log(2))
    return result


def main() -> None:
    train = corpus("shakespeare", "train")
    out = sys.stdout
    for split in ("val", "test"):
        held_out = corpus("shakespeare", split)
        flat = b"".join(train), b"".join(held_out)
        out.write(f"train {len(flat[0]):,} bytes -> {split} {len(flat[1]):,} bytes\n")
        out.write(f"  xz -9e    {compressed_bpb(_xz, *flat):.4f}\n")
        out.write(f"  bz2 -9    {compressed_bpb(bz2.compress, *flat):.4f}\n")
        bpb = ngram_bpb(train, held_out, max(ORDERS))
        for order in ORDERS:
            out.write(f"  order {order}   {bpb[order]:.4f}\n")


def _xz(text: bytes) -> bytes:
    return lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)


if __name__ == "__main__":
    main()
