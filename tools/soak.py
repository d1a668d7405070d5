"""
Do memory or open files of a run grow? Slopes an hour from a log of train_kd.py.

  python tools/soak.py --data train.jsonl --out out/run ...   # train_kd.py, with "resident" and "open_files" in its log
  python tools/soak.py out/run/log.jsonl

The first fifth of each start of the run is left out: caches and allocators fill there. Neighbouring lines are
averaged to 20 blocks, since memory wanders. "grows": the 95% interval is above 0, and the rise over the run is
more than 1% of the mean (of memory) or half a file. Exit code 1 if anything grows.
"""
import argparse
import json
import os
import resource
import statistics
import sys
from pathlib import Path

KEYS = {"resident": "GiB", "open_files": "files", "workers": "processes"}
BLOCKS = 20


def read(path):
    """-> the starts of the run, lists of records, without their first fifths."""
    starts = []
    for line in Path(path).read_text().splitlines():
        record = json.loads(line)
        if "resident" in record:
            if not starts or record["hours"] < starts[-1][-1]["hours"]:
                starts.append([])
            starts[-1].append(record)
    return [[r for r in start if r["hours"] > 0.2 * start[-1]["hours"]] for start in starts]


def slope(starts, key):
    """Least squares over all starts, each with its own level -> (slope an hour, low, high, mean, hours)."""
    lines = sum(map(len, starts))
    size, points = max(1, lines // BLOCKS), []
    for start in starts:
        blocks = [start[i:i + size] for i in range(0, len(start), size)]
        pairs = [(statistics.fmean(r["hours"] for r in block), statistics.fmean(r[key] for r in block)) for block in blocks]
        x, y = (statistics.fmean(values) for values in zip(*pairs))
        points += [(a - x, b - y) for a, b in pairs]
    free, spread = len(points) - len(starts) - 1, sum(x * x for x, _ in points)
    if free < 3 or not spread:
        raise ValueError(f"{lines} lines with resident memory after the first fifth, too few for a slope; run longer")
    rate = sum(x * y for x, y in points) / spread
    error = (sum((y - rate * x) ** 2 for x, y in points) / free / spread) ** 0.5
    z = statistics.NormalDist().inv_cdf(0.975)
    wide = error * (z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2))  # Student's t
    hours = sum(start[-1]["hours"] - start[0]["hours"] for start in starts)
    return rate, rate - wide, rate + wide, statistics.fmean(r[key] for start in starts for r in start), hours


def verdict(starts, key):
    """-> (one line for people, whether it grows)"""
    rate, low, high, mean, hours = slope(starts, key)
    grows = low > 0 and rate * hours > (0.01 * mean if key == "resident" else 0.5)
    return (f"{key:<10} {rate:+.4f} {KEYS[key]} an hour [{low:+.4f}, {high:+.4f}], mean {mean:.3f} over {hours:.2f} hours: "
            f"{'grows' if grows else 'flat'}"), grows


def resources():
    """Resident memory in GiB and open files of this process; of Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"resident": pages * resource.getpagesize() / 2**30, "open_files": len(os.listdir("/proc/self/fd"))}


def train(argv):
    """train_kd.py; each step's line of its log tells the resources, too."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import train_kd
    log = train_kd.log
    train_kd.log = lambda args, record, *more: log(args, {**record, **(resources() if "loss" in record else {})}, *more)
    return train_kd.main(train_kd.get_args(argv))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0].startswith("--") and argv[0] != "--help":
        return train(argv)
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    p.add_argument("log", help="log.jsonl of train_kd.py")
    starts = read(p.parse_args(argv).log)
    logged = {key for start in starts for record in start for key in record}
    lines = [verdict(starts, key) for key in KEYS if key in {*logged, "resident"}]
    print("\n".join(line for line, _ in lines))
    return int(any(grows for _, grows in lines))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError, OSError) as error:
        print(f"soak.py: {error}", file=sys.stderr)
        sys.exit(2)
