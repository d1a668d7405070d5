"""
What the benchmarks share: processes of their own, clocks, memory, rows, tables. See bench.py.

A rival is measured in a process of its own, a Worker, so that no other's memory or warm caches count for it.
Memory is the resident set (CPU, Linux) or the allocator's (CUDA).
"""
import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
import traceback
from pathlib import Path
from statistics import median  # noqa: F401

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as m
import synth_speech
import train_kd


# ---- processes ----

CONTEXT = "spawn"


class Worker:
    """A process of its own that answers jobs, the arguments of a function."""

    def __init__(self, function, out):
        self.pipe, end = multiprocessing.Pipe()
        log = Path(out) / f"{function.__module__}.log"
        self.process = multiprocessing.get_context(CONTEXT).Process(target=serve, args=(function, end, log))
        self.process.start()
        end.close()

    def ask(self, **job):
        """The answer to a job. Raises: RuntimeError with the job's own traceback."""
        self.pipe.send(job)
        answer = self.pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{job}: {answer}")
        return answer

    def close(self):
        self.process.kill()
        self.process.join()


take_turn = None  # within a job: answer None, and wait for another; given by `serve`


def serve(function, pipe, log):
    """The other side of a Worker; all that is printed goes to the log. A GPU that is full is an answer, too."""
    global take_turn
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(m.cores())

    def take_turn():
        pipe.send(None)
        pipe.recv()

    while True:  # until it is killed
        job = pipe.recv()
        try:
            answer = function(**job)
        except torch.OutOfMemoryError:
            answer = {"error": "out of memory"}
        except Exception:
            answer = traceback.format_exc()
        pipe.send(answer)


def installed(rivals):
    """{rival: packages it needs} -> rivals that can run here; says aloud which cannot."""
    there = [rival for rival, packages in rivals.items() if all(map(importlib.util.find_spec, packages))]
    for rival in set(rivals) - set(there):
        print(f"{rival} is left out: pip install {' '.join(rivals[rival])}", flush=True)
    return there


def compare(function, rivals, sizes, args, **job):
    """Rivals take turns on each size, each in a process that has warmed up -> {rival: {size: list of answers}}"""
    answers = {rival: {size: [] for size in sizes} for rival in rivals}
    with contextlib.ExitStack() as stack:
        workers = {rival: stack.enter_context(contextlib.closing(Worker(function, args.out))) for rival in rivals}
        for rival, worker in workers.items():
            worker.ask(rival=rival, size=sizes[0], device=args.device, **job)
        for size in sizes * args.repeats:
            for rival, worker in workers.items():
                answers[rival][size].append(worker.ask(rival=rival, size=size, device=args.device, **job))
                shown = {k: v for k, v in answers[rival][size][-1].items() if not isinstance(v, list)}
                print(f"{size}: {rival} {shown}", flush=True)
    return answers


# ---- clocks and memory ----

def now(device):
    """Seconds, when all that was asked for is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rest_bytes(device):
    """Memory in use now; from here the peak counts anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def peak_bytes(device):
    """Highest memory since rest_bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def questions():
    return [json.loads(line)["prompt"] for line in (ROOT / "tools/questions.jsonl").read_text().splitlines()]


def manifest_of(args, folder, count):
    """FOLDER/train.jsonl, `count` rows with answers and clips: of --data, or questions that espeak-ng speaks -> its path."""
    (folder / "wav").mkdir(parents=True)
    rows, lines = [], []
    if args.data:
        rows = [r for r in train_kd.read_manifest(args.data) if r["response"] and r.get("audio") and r["prompt"]]
        for row in rows[:count]:
            row["audio"] = f"wav/{Path(shutil.copy(row['audio'], folder / 'wav')).name}"
    else:
        options = argparse.Namespace(seed=0, takes=1, noise=0, engine="espeak", voices=synth_speech.VOICES["espeak"], out=folder)
        for k, prompt in enumerate(questions()[:count]):
            [clip] = synth_speech.clips_of(options, {"id": f"q{k}", "prompt": prompt})
            answer = " ".join(random.Random(k).choices(questions(), k=40))
            rows.append({"prompt": prompt, "response": answer, "finish": "length", **synth_speech.synthesise(options, clip)})
    for k in range(count):  # few are repeated
        lines.append(json.dumps({**rows[k % min(len(rows), count)], "id": f"row-{k}"}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    return folder / "train.jsonl"


# ---- reports ----

def environment(device):
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    where = torch.cuda.get_device_name() if device == "cuda" else f"{found[1] if found else 'CPU'}, {m.cores()} cores"
    packages = [name for name in ("torch", "transformers", "liger_kernel", "trl") if importlib.util.find_spec(name)]
    return {"device": where, **{name: importlib.metadata.version(name) for name in packages}}


def table(header, rows):
    """Markdown; None is an empty cell."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)
