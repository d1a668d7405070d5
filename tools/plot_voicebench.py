"""
Draw a report of eval_voicebench.py: text against speech; the teacher is the line to reach.

  python tools/plot_voicebench.py out/voicebench/report.json out/voicebench/report.png
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def draw(report, path):
    """Scores of subsets and means as 0-100, where there are any."""
    shown = {name: entry for name, entry in {**report["subsets"], **report["means"]}.items()
             if any(system in entry for system in report["systems"])}
    figure, axis = plt.subplots(figsize=(2 + 0.9 * len(shown), 4), constrained_layout=True)
    for system in report["systems"]:
        at, height = np.array([(x, 100 / entry.get("scale", 100) * entry[system][0])
                               for x, entry in enumerate(shown.values()) if system in entry]).T
        if system == "teacher text":
            axis.hlines(height, at - 0.45, at + 0.45, "#222222", label=system)
        else:
            speech = system == "student speech"
            axis.bar(at + (0.2 if speech else -0.2), height, 0.4, label=system,
                     color="#e07b27" if speech else "#3b6fb6")
    axis.set_xticks(range(len(shown)), shown, rotation=30, ha="right")
    axis.set_ylabel("score, 0-100")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        draw(json.load(file), sys.argv[2])
