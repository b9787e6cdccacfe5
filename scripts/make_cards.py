"""Write the counted facts of every model card from its config, between two markers; keep the prose.

python scripts/make_cards.py            # write
python scripts/make_cards.py --check    # write nothing; name the cards that are out of date
"""

import argparse
import sys
from pathlib import Path

from hybridzoo import HybridConfig
from hybridzoo.describe import draw, facts, row_name
from hybridzoo.errors import ConfigError
from hybridzoo.zoo.card import Card

ROOT = Path(__file__).resolve().parents[1]
START = "<!-- facts: counted by scripts/make_cards.py from the config; do not edit -->\n"
END = "<!-- end of facts -->\n"


def bytes_text(n: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:,.2f} {unit}"
    return f"{n} B"


def render_facts(config: HybridConfig, config_name: str) -> str:
    found = facts(config)
    weights, states = found["weight_bytes"], found["state_bytes"]
    rows = [
        ("parameters", f"{found['n_params']:,}"),
        ("active a token", f"{found['n_active_params']:,}"),
        ("d_model, vocabulary", f"{found['d_model']:,}, {found['vocab_size']:,}"),
        ("pattern", f"`{config.pattern}`"),
        ("weights in bf16", bytes_text(weights)),
        ("weights in fp32", bytes_text(found["weight_bytes_fp32"])),
        *(
            (f"state of one sequence at {n // 1024}K tokens", bytes_text(size))
            for n, size in states.items()
        ),
        ("least memory in bf16, weights and state at 4K", bytes_text(weights + states[4096])),
    ]
    table = "".join(f"| {name} | {value} |\n" for name, value in rows)
    legend = "".join(
        f"| {row_name(row)} | {row['kind']} | {row['count']} | {row['n_params']:,} |\n"
        for row in found["layers"]
    )
    stack = "".join(f"{first:>4}  {' '.join(places)}\n" for first, places in draw(config))
    return (
        f"From `configs/{config_name}`; state in bf16, with fp32 where the model keeps it.\n\n"
        f"| | |\n|---|---|\n{table}\n"
        f"```text\n{stack}```\n\n"
        f"| letter | kind | places | parameters each |\n|---|---|---|---|\n{legend}"
    )


def with_facts(text: str, block: str) -> str:
    """`text` with `block` between its markers; there is one of each, in order."""
    before, start, rest = text.partition(START)
    old, end, after = rest.partition(END)
    if not (start and end) or START in old + after or END in before + after:
        raise ConfigError(
            f"no block for the facts; it begins with {START.strip()!r} and ends with "
            f"{END.strip()!r}, once each. Add the two lines."
        )
    return f"{before}{start}{block}{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if one is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="holds configs/ and model_cards/")
    arguments = parser.parse_args()
    stale = []
    for path in sorted((arguments.root / "configs").glob("*.yaml")):
        card = arguments.root / "model_cards" / f"{path.stem}.md"
        try:
            Card.read(card)
            text = card.read_text(encoding="utf-8")
            fresh = with_facts(text, render_facts(HybridConfig.load(path), path.name))
        except ConfigError as error:
            sys.exit(f"{card.name}: {error}")
        if fresh != text:
            stale.append(card.name)
            if not arguments.check:
                card.write_text(fresh, encoding="utf-8")
    if stale and arguments.check:
        sys.exit(f"out of date: {', '.join(stale)}; run python scripts/make_cards.py")


if __name__ == "__main__":
    main()
