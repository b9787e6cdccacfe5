"""Fuzz one parser with its branches as the guide, until it breaks or is stopped. Outside CI.

    pip install atheris
    python scripts/fuzz.py jamba                            # a name of tests/fuzzing.py
    python scripts/fuzz.py shard corpus -max_total_time=600

What follows the name goes to libFuzzer: a folder for the inputs that it finds, and its options. An
input that breaks the parser is left in the working directory as crash-<hash>; the same command with
that file runs it again.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import atheris
except ModuleNotFoundError:
    sys.exit("fuzz.py: atheris is not installed; it guides the fuzzing. Run `pip install atheris`.")

# what is imported here is watched: which branches an input reaches
with atheris.instrument_imports(include=["hybridzoo", "yaml", "json"]):
    from tests.fuzzing import targets


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        known = targets(Path(root))
        name, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
        if name not in known:
            sys.exit(f"fuzz.py: {name!r} is no parser; there are: {', '.join(known)}. Name one.")
        target, seeds = known[name], Path(root, "seeds")
        seeds.mkdir()
        for i, seed in enumerate(target.seeds):
            (seeds / str(i)).write_bytes(seed)

        def feed(content: bytes) -> None:
            target.feed(content)

        # the first folder takes new inputs, so the seeds come last
        atheris.Setup([sys.argv[0], *rest, str(seeds)], feed)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
