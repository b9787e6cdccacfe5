"""Draw what parallel.py measured: speed against one GPU beside its bound, and the loss curves.

python scripts/bench/plot_parallel.py PICTURE.png NAME=OUT.json [NAME=OUT.json]
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"jamba": "#4269d0", "mamba2": "#ff725c"}
TITLES = {"jamba": "Jamba-style, 1.29 B", "mamba2": "Mamba-2-style, 1.06 B"}


def main() -> None:
    picture, *pairs = sys.argv[1:]
    reports = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        part = json.loads(Path(path).read_text())[name]
        # a later file's part fills in what an earlier one lacks
        reports[name] = {**reports.get(name, {}), **{k: v for k, v in part.items() if v}}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for i, (name, report) in enumerate(reports.items()):
        times = {k: v for k, v in report["times"].items() if k != "one GPU"}
        places = [row + (i - 0.5) * 0.38 for row in range(len(times))]
        speed = [v["speedup"] for v in times.values()]
        floor = [v["speedup"] / v["floor_over_time"] for v in times.values()]
        left.barh(places, speed, 0.34, color=COLOURS[name], label=TITLES[name])
        left.scatter(floor, places, marker="|", s=220, color="black", label=None if i else "bound")
        for place, value in zip(places, speed, strict=True):
            left.text(value - 0.04, place, f"{value:.2f}", ha="right", va="center", color="white")
        left.set_yticks(range(len(times)), list(times))
        curves = report["curves"]
        steps = range(1, 1 + len(curves["one GPU bf16"]))
        one, two = ([loss for loss, _ in curves[f"{k} bf16"]] for k in ("one GPU", "tp=2"))
        right.plot(steps, one, color=COLOURS[name], lw=3, alpha=0.4, label=f"{TITLES[name]}, one")
        right.plot(steps, two, color=COLOURS[name], lw=1, label=f"{TITLES[name]}, TP=2")
    left.invert_yaxis()
    left.set(xlabel="tokens a second against one GPU", xlim=(0, 2.1))
    right.set(xlabel="step", ylabel="loss, nats a token (bf16)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    right.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
