"""
What the benchmarks share: processes of their own, clocks, memory, the machine's matmul peak, tables.

A rival is measured in a process of its own, a Worker, so that no other's memory or warm caches count for it.
Memory is the resident set (CPU, Linux) or the allocator's (CUDA). Not run by itself; see bench.py.
"""
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


# ---- processes ----

class Worker:
    """`python SCRIPT` in a process of its own: answers a line of JSON with a line of JSON (see serve)."""

    def __init__(self, script, log, **environment):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment}
        self.log, self.started = Path(log), time.time()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=open(log, "a"), text=True, env=environment)

    def send(self, **job):
        self.job = job
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def receive(self):
        """The answer to what was sent. Raises: RuntimeError with the end of the log if the process died."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args[1]} {self.job} died with exit code {self.process.wait()}; "
                               f"{self.log} ends:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def ask(self, **job):
        self.send(**job)
        return self.receive()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self, patience_s=20):
        self.process.stdin.close()
        try:
            self.process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:  # a loader's process that does not end
            self.process.kill()
            self.process.wait()


def take_turn():
    """Within a job: answer null, and wait for another line. Given by `serve`."""
    raise RuntimeError("no worker's process")


def serve(function):
    """The other side of Worker.ask: jobs from stdin, answers to stdout; all that is printed goes to stderr.
    A GPU that is full is an answer, too: {"error": "out of memory"}."""
    global take_turn
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def take_turn():
        print("null", file=answers, flush=True)
        sys.stdin.readline()

    for line in sys.stdin:
        try:
            answer = function(**json.loads(line))
        except torch.OutOfMemoryError:
            answer = {"error": "out of memory"}
        print(json.dumps(answer), file=answers, flush=True)
    answers.close()
    os._exit(0)  # libraries leave threads behind


def installed(rivals):
    """{rival: packages it needs} -> rivals that can run here; says aloud which cannot."""
    runs = []
    for rival, packages in rivals.items():
        missing = [p for p in packages if not importlib.util.find_spec(p)]
        if missing:
            print(f"{rival} is left out: pip install {' '.join(missing)}", flush=True)
        else:
            runs.append(rival)
    return runs


# ---- clocks and memory ----

def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def resident_bytes(key):
    """VmRSS (now) or VmHWM (peak) of this process, Linux."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def rest_bytes(device):
    """Memory in use now; from here the peak counts anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def peak_bytes(device):
    """Highest memory since rest_bytes."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")


def matmul_peak(device, dtype, seconds=0.7):
    """FLOP/s of a large square matrix product: the best of those that fit into the time."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best, stop = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < stop:
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


# ---- reports ----

def environment(device):
    return {"device": torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {cores()} cores",
            "torch": torch.__version__, **{name: version(name) for name in ("transformers", "liger_kernel", "trl")}}


def cores():
    return len(os.sched_getaffinity(0))


def processor():
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else "CPU"


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def median(values):
    return statistics.median(values)


def table(header, rows):
    """Markdown; None is an empty cell."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def gib(size):
    return None if size is None else f"{size / 2**30:.2f}"


def figure(panels):
    """Empty axes side by side -> (figure, list of axes)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    drawn, axes = plt.subplots(1, panels, figsize=(3.7 * panels, 3.4), constrained_layout=True, squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return drawn, list(axes[0])


def scatter(axis, places, **labels):
    """{name: (x, y)} from zero on, each with its name."""
    for name, place in places.items():
        axis.scatter(*place, color=colour(name))
        axis.annotate(name, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axis.margins(0.25)
    axis.set(xlim=(0, None), ylim=(0, None), **labels)


def colour(name):
    return "#e07b27" if name.startswith("ours") else "#3b6fb6"
