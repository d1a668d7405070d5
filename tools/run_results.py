"""
Every run of the result, one after the other: train, measure, keep what is small. Stopped anywhere, the same command goes on.

  python tools/run_results.py --data data/result --out out/result             # about 6 hours on two cores
  python tools/run_results.py --data data/result --out out/result --only base R4 R1
  python tools/run_results.py --data data/result --out out/result --seeds 1 2 --only base R1 R3 R4 R6
  python tools/run_results.py --data data/result --out out/result --jobs 18 --seeds 0 1 2 --only start base R1 R3 R4 R6 R8     # on a GPU
  python tools/run_results.py --data data/result --out out/result --only lambda0 lambda25 lambda75 lambda100 steps25 steps50 steps200
  python tools/run_results.py --data data/result-4000 --out out/result-4000 --max-steps 200 --batch-size 40 --sound-batch-size 20 \
      --max-bad-rows 20 --only start base R3 R6 R8 prompts500 prompts1000 prompts2000      # five times the data

Reads   what tools/result_data.sh made
Writes  OUT/RUN/ (students, run.log), RESULTS/RUN/: command.txt, args.json, log.jsonl, measured.json, answers.jsonl; failed.txt
        in place of these if a run fails; the others go on. --seeds 1 writes RUN-seed1.
tools/plot_results.py makes the tables and pictures. What is done is done once: a run is made again only if its command, the
content of its rows, or the weights that it starts from have changed.
"""
import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS)]
import eval_voicebench as vb
import measure_result
import model as m
from result_data import PARTS

# what each run adds to what all share; train_kd.py's defaults are the paper's: both channels, CE on the teacher's answers and
# KL by 0.5 tau^2 at tau 2
RUNS = {
    "base": "--channels s2t --labels reference --kd-weight 0",  # the ordinary way to teach an LLM to hear
    "R1": "--channels s2t --labels reference --kd-weight 0",
    "R2": "--channels s2t --labels reference",
    "R3": "--channels s2t --kd-weight 0",
    "R4": "--channels s2t",
    "R5": "--channels t2t",
    "R6": "",
    "R7": "",  # R6 without sounds
    "R8": "--ce-weight 0 --kd-weight 1 --temperature 1 --lora-rank 16",  # R6 with KL alone and LoRA, as in the quickstart
    "R9": "--lora-rank 16", "R10": "--ce-weight 0 --kd-weight 1 --temperature 1"}  # which of the two does it
ORDER = "start base R6 R1 R4 R3 R2 R5 R8 R7 R9 R10".split()  # a run that is stopped has told the most; start: the untrained student
# curves through R6, where lambda is 0.5 and every row is seen once in 100 steps; only if they are named
LAMBDAS = {f"lambda{percent}": percent / 100 for percent in (0, 25, 75, 100)}  # KL by it, CE by 1 - it
STEPS = {f"steps{steps}": steps for steps in (25, 50, 200)}
PROMPTS = {f"prompts{count}": count for count in PARTS}  # R8 with a part of the prompts, as many steps
RUNS |= {run: f"--kd-weight {share:g} --ce-weight {1 - share:g}" for run, share in LAMBDAS.items()}
RUNS |= dict.fromkeys(STEPS, "") | dict.fromkeys(PROMPTS, RUNS["R8"])
NOISE_CURVE = ("start", "base", "R6", "R8")  # by speech in noise of more than one strength
ONE_CHANNEL = ("base", "R1", "R2", "R3", "R4", "R5")
STEP_S = {True: 13, False: 20}  # seconds of a step by one channel, by both, on two cores, for the time left
MEASURE_S = 560
LR = dict.fromkeys(["R8", "R9", *PROMPTS], 1e-3)  # of LoRA; the others' LLM 5e-5, base's --base-lr


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", required=True, help="folder that tools/result_data.sh wrote")
    p.add_argument("--out", required=True, help="folder of students, 1 GB each")
    p.add_argument("--results", help="folder of what is small; default: OUT/results")
    p.add_argument("--only", nargs="+", choices=[*ORDER, *LAMBDAS, *STEPS, *PROMPTS], help="these, in the order given; default: all but the curves")
    p.add_argument("--seeds", nargs="+", type=m.number(int, 0, 2**32), default=[0], help="of the order of rows; all runs with each")
    p.add_argument("--jobs", type=m.number(int, 1), default=1, help="runs side by side: a GPU has room for a core's worth each")
    p.add_argument("--teacher", default=m.DEFAULT_LLM, help="text LLM, folder or hub id")
    p.add_argument("--student", default=m.DEFAULT_STUDENT, help="the untrained student, WHISPER+LLM")
    p.add_argument("--base-steps", type=m.number(int, 1), default=40, help="optimizer steps of base")
    p.add_argument("--base-lr", type=m.number(float, 0), default=1e-4, help="of base's LLM")
    p.add_argument("--max-steps", type=m.number(int, 1), default=100, help="optimizer steps of the others")
    p.add_argument("--batch-size", type=m.number(int, 1), default=16, help="rows with a teacher in a step")
    p.add_argument("--sound-batch-size", type=m.number(int, 1), default=8, help="rows about sounds in a step")
    p.add_argument("--save-every", type=m.number(int, 1), default=20, help="steps between checkpoints, 1.6 GB each")
    p.add_argument("--max-bad-rows", type=m.number(int, 0), default=0, help="as of train_kd.py: in many clips one is not understood")
    p.add_argument("--limit", type=m.number(int, 0), default=0, help="measure on so many rows of each set; 0: as measure_result.py does")
    args = p.parse_args(argv)
    args.results = args.results or str(Path(args.out, "results"))
    args.seed = args.seeds[0]  # of a run
    return args


# ---- one run ----

def name_of(args, run):
    """Its folder: the untrained student has no seed."""
    return run if args.seed == 0 or run == "start" else f"{run}-seed{args.seed}"


def student_of(args, run):
    """What a run trains or, of one that is trained, what it wrote."""
    return args.student if run == "start" else str(Path(args.out, name_of(args, run), "last"))


def manifests_of(args, run):
    names = [f"both-train-{PROMPTS[run]}" if run in PROMPTS else "both-train"] + ["sounds"] * (run != "R7") + ["transcripts"] * (run == "base")
    paths = [Path(args.data, engine, f"{name}.jsonl") for name in names for engine in ("piper", "espeak")]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{missing[0]}: no such file; expected the folder that `bash tools/result_data.sh` writes, see there")
    return paths


def steps_of(args, run):
    return {"start": 0, "base": args.base_steps}.get(run, STEPS.get(run, args.max_steps))


def command_of(args, run):
    """The command of a training run, as a list of words."""
    start = args.student if run == "base" else student_of(args, "base")
    words = ["python", "train_kd.py", "--teacher", args.teacher, "--student", start, "--data", *map(str, manifests_of(args, run))]
    words += shlex.split(RUNS[run])
    words += ["--max-steps", steps_of(args, run), "--batch-size", args.batch_size]
    lr = args.base_lr if run == "base" else LR.get(run, 5e-5)
    words += ["--sound-batch-size", args.sound_batch_size, "--lr-llm", lr, "--lr-warmup-steps", 4]
    words += ["--cache", Path(args.data, ".cache"), "--seed", args.seed, "--save-every", args.save_every, "--resume"]
    words += ["--max-bad-rows", args.max_bad_rows] if args.max_bad_rows else []
    if not torch.cuda.is_available() and has_amx():
        words += ["--dtype", "bfloat16"]
    return [str(word) for word in [*words, "--out", Path(args.out, name_of(args, run))]]


def has_amx():
    """Whether this CPU multiplies bfloat16 in tiles: only then it is the faster."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "amx_bf16" in flags.read_text()


def key_of(args, run):
    """Changes with the options, the content of the rows, and the weights that the run starts from; not with a folder's name, nor with
    the computer's dtype."""
    args = argparse.Namespace(**{**vars(args), "save_every": 20})  # nor with the number of checkpoints
    start = args.student if run == "base" else student_of(args, "base")
    paths, words = {start, str(Path(args.data, ".cache")), str(Path(args.out, name_of(args, run))), *map(str, manifests_of(args, run))}, []
    for word in command_of(args, run):
        if word not in paths and word not in ("--dtype", "bfloat16"):
            words.append(word)
    content = [words, [m.digest(path) for path in manifests_of(args, run)], vb.weights_of(start)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def call(words, log):
    """Run one of our scripts, its output at the end of `log`.

    Raises: RuntimeError with its last line if it fails; SystemExit if it was stopped.
    """
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        finally:  # whoever stops this script stops that one, which keeps what it has
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code == 143:
        raise SystemExit("run_results.py: stopped; the same command goes on")
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(f"exit code {code}: {lines[-1][:300] if lines else 'it said nothing'}")


def train(args, run, results):
    """Train a student, unless there is one by the same key."""
    out, key = Path(args.out, name_of(args, run)), key_of(args, run)
    begun = out / "key.txt"
    if begun.exists() and begun.read_text() != key:
        print(f"   {out}: its command, rows or base have changed: made again", flush=True)
        shutil.rmtree(out)
    m.write_atomically(results / "command.txt", shlex.join(command_of(args, run)) + "\n")
    done = (out / "last/config.json").exists() and begun.exists()
    if not done:
        for name in ("measured.json", "answers.jsonl"):  # of another student
            (results / name).unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        m.write_atomically(begun, key)
        call([str(TOOLS.parent / "train_kd.py"), *command_of(args, run)[2:]], out / "run.log")
    for name in ("args.json", "log.jsonl"):
        shutil.copyfile(out / name, results / name)
    for path in out.glob("ckpt-*.pt"):
        path.unlink()  # 1.6 GB each; what goes on from here starts with the student
    return "was trained before" if done else "trained"


def measure(args, run, results):
    """Measure a student; measure_result.py knows what is measured already."""
    words = [student_of(args, run), "--data", args.data, "--teacher", args.teacher, "--start", args.student, "--out", results]
    words += ["--limit", args.limit] if args.limit else []
    words += ["--noise-db", 20, 10, 5, 0] if run in NOISE_CURVE else []
    words = [str(word) for word in words]
    if measure_result.is_measured(measure_result.get_args(words)):
        return "was measured before"
    log = Path(args.out, name_of(args, run), "measure.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    call([str(TOOLS / "measure_result.py"), *words], log)
    return "measured"


# ---- all runs ----

def seconds_of(args, run):
    return steps_of(args, run) * STEP_S[run in ONE_CHANNEL] + MEASURE_S


def clock(seconds):
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def one_by_one(args):
    runs, begun, failed = args.only or ORDER, time.monotonic(), {}
    for run in runs:
        if run != "start":
            manifests_of(args, run)  # before the first hour is spent
    for k, run in enumerate(runs):
        left = sum(seconds_of(args, later) for later in runs[k:])
        print(f"== {clock(time.monotonic() - begun)}  {run}, {k + 1} of {len(runs)}; up to {clock(left)} left", flush=True)
        results = Path(args.results, name_of(args, run))
        results.mkdir(parents=True, exist_ok=True)
        try:
            if run not in ("start", "base") and not Path(student_of(args, "base"), "config.json").exists():
                raise RuntimeError("there is no base to start from; --only base trains it")
            done = [train(args, run, results)] if run != "start" else []
            done.append(measure(args, run, results))
            (results / "failed.txt").unlink(missing_ok=True)
            print(f"   {run} {', '.join(done)}: {results}", flush=True)
        except (RuntimeError, OSError, ValueError) as error:
            failed[run] = " ".join(str(error).split())
            m.write_atomically(results / "failed.txt", failed[run] + "\n")
            print(f"   {run} failed, {failed[run]}", flush=True)
    for run, why in failed.items():
        print(f"failed: {run}: {why}")
    print(f"{len(runs) - len(failed)} of {len(runs)} runs are there; python tools/plot_results.py --results "
          f"{os.path.relpath(args.results)}")
    return 1 if failed else 0


def side_by_side(args):
    """Each run of each seed in a process of its own, --jobs of them at a time; it waits for the base of its seed."""
    tasks, running, begun, failed = [], {}, {}, []
    for run in args.only or ORDER:
        tasks += [(seed, run) for seed in args.seeds[:1 if run == "start" else None]]
    waiting = list(tasks)

    def is_ready(seed, run):
        base = seed, "base"
        if run in ("start", "base") or base not in tasks or base in begun and base not in running:
            return True
        trained = Path(args.out, name_of(argparse.Namespace(seed=seed), "base"), "last/config.json")
        return base in begun and trained.exists() and trained.stat().st_mtime > begun[base]  # it is being measured

    threads = {"OMP_NUM_THREADS": str(max(1, m.cores() // args.jobs)), "TOKENIZERS_PARALLELISM": "false"}
    try:
        while waiting or running:
            for task in [task for task, process in running.items() if process.poll() is not None]:
                if running.pop(task).returncode:
                    failed.append(task)
            for task in [task for task in waiting if is_ready(*task)][:args.jobs - len(running)]:
                seed, run = task
                words = [*sys.argv[1:], "--jobs", "1", "--seeds", str(seed), "--only", run]
                begun[task] = time.time()
                running[task] = subprocess.Popen([sys.executable, __file__, *words], env=os.environ | threads)
                waiting.remove(task)
            time.sleep(0.2)
    finally:
        for process in running.values():  # each stops its own, which keeps what it has
            process.terminate()
        for process in running.values():
            process.wait()
    print(f"{len(tasks) - len(failed)} of {len(tasks)} runs are there; failed: {sorted(failed) or 'none'}")
    return 1 if failed else 0


def main(args):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, m.stop_now)
    if args.jobs > 1:
        return side_by_side(args)
    codes = []
    for seed in args.seeds:
        codes.append(one_by_one(argparse.Namespace(**{**vars(args), "seed": seed})))
    return max(codes)


if __name__ == "__main__":
    try:
        sys.exit(main(get_args()))
    except (ValueError, RuntimeError, OSError) as error:
        print("run_results.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
