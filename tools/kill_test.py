"""
Kill each script at many moments, start the same command again, compare with a run left alone.

  python tools/kill_test.py --work /tmp/kills --out results/kills       # default models, real speech
  python tools/kill_test.py --work /tmp/kills --out /tmp/kills/log --llm LLM --student STUDENT --fork --kills 3

SIGKILL goes to all processes of a run at once: at moments drawn between the first and the last write of the
run left alone, and once within each kind of write (the file is open, or not renamed yet). A run that was killed
is started again and perhaps killed again; in the end its files must be those of the run left alone: manifests,
sound and answers byte for byte, and log.jsonl but for times, memory and throughput.

Writes  OUT.json (every kill), OUT.txt (a table). Exit code 1: some file differs.
"""
import argparse
import collections
import hashlib
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
VOLATILE = ("tokens_per_s", "memory", "wait", "padding", "resident", "open_files", "workers", "hours", "answer_tokens_per_s", "out",
            "feature_cache")
IN_A_ROW = 5  # at most so many kills before a run is left to end


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--work", required=True, help="folder of all runs; emptied")
    p.add_argument("--out", required=True, help="the log: OUT.json, OUT.txt")
    p.add_argument("--only", nargs="+", default=["synth", "train", "train2", "voicebench", "mmau"], help="train2: two ranks")
    p.add_argument("--kills", type=int, default=20, help="of each command, at drawn moments")
    p.add_argument("--no-kinds", action="store_true", help="no kills beside these within each kind of write")
    p.add_argument("--llm", help="folder of another LLM than the default")
    p.add_argument("--student", help="another student than the default")
    p.add_argument("--fork", action="store_true", help="run in forks of this process, which has imported torch")
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    return p.parse_args(argv)


# ---- in the processes that are killed ----

def descendants(pid):
    children = collections.defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            children[int(path.read_text().rpartition(")")[2].split()[1])].append(int(path.parent.name))
        except OSError:
            pass  # it has just ended
    found = [pid]
    for parent in found:
        found += children[parent]
    return found


def kill_tree(pid):
    """SIGKILL to a process and all that descend from it, the caller last."""
    for each in sorted(descendants(pid), key=os.getpid().__eq__):
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            pass


def kind_of(event, path, folder):
    """Event of Python's audit -> "write run/ckpt.tmp" and the like, numbers left out."""
    name = os.path.relpath(path, folder)
    name = re.sub(r"(best|last)\.tmp/.*", r"\1.tmp/*", name)
    name = re.sub(r"(teacher|student|divergence)-[^/]*?\.", "ANSWERS.", name)
    return f"{event} {re.sub('[0-9]+', 'N', re.sub('[0-9a-f]{8,}', 'X', name))}"


def child(spec, script, argv):
    """Run a script as __main__; report its writes below spec["folder"], or kill it at one of them."""
    folder, started, counts = os.path.abspath(spec["folder"]), spec["started"], collections.Counter()
    top = os.getppid() if "RANK" in os.environ else os.getpid()
    report = os.open(spec["report"], os.O_WRONLY | os.O_CREAT | os.O_APPEND) if "report" in spec else None

    def hook(event, args):
        if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR):
            name, path = "write", args[0]
        elif event in ("os.rename", "os.remove", "os.truncate", "shutil.rmtree"):
            name, path = event.partition(".")[2], args[1 if event == "os.rename" else 0]
        else:
            return
        path = os.path.abspath(os.fspath(path))
        if not path.startswith(folder + "/"):
            return
        kind = kind_of(name, path, folder)
        counts[kind] += 1
        if report is not None:
            os.write(report, (json.dumps([time.time() - started, kind]) + "\n").encode())
        elif kind == spec.get("kind") and counts[kind] == spec["number"]:
            if spec["after_s"]:  # the file will be open by then
                threading.Timer(spec["after_s"], kill_tree, (top,)).start()
            else:
                kill_tree(top)
                time.sleep(60)

    sys.addaudithook(hook)
    sys.argv, sys.path[0] = [script, *argv], str(ROOT)
    runpy.run_path(str(ROOT / script), run_name="__main__")


def fork(command, environment, output):
    """`command` in a fork of this process -> pid. Two ranks are two forks of a fork."""
    script, argv, spec, ranks = command
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        os.environ.update(environment)
        if ranks:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            agent, forks = os.getpid(), {}
            for rank in range(2):
                if not (one := os.fork()):
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                    break
                forks[one] = rank
            if os.getpid() == agent:
                codes = []
                while len(codes) < 2:
                    codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
                os._exit(max(map(abs, codes)))
        context = multiprocessing.get_context
        multiprocessing.get_context = lambda *_: context("fork")  # a spawned worker would import torch for seconds
        try:
            child(spec, script, argv)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else bool(end.code)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---- runs ----

def start(args, command, folder, **spec):
    """(script, arguments, ranks?) writes below `folder` -> (pid, time of its start)."""
    script, argv, ranks = command
    spec = {**spec, "folder": str(folder), "started": time.time()}
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    with open(f"{folder}.out", "ab") as output:
        if args.fork:
            return fork((script, argv, spec, ranks), environment, output), spec["started"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if ranks else []
        line = [sys.executable, *torchrun, __file__, "--child", json.dumps(spec), script, *argv]
        process = subprocess.Popen(line, env={**os.environ, **environment}, stdout=output, stderr=output)
        return process.pid, spec["started"]


def wait(pid, started, moment=None, seen=None, limit_s=900):
    """Exit code of a run; SIGKILL comes `moment` seconds after its start, or when seen() is true."""
    killed = False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        passed = time.time() - started
        if done:
            break
        if passed > limit_s or (moment is not None and passed >= moment) or (seen and seen()):
            killed = True
            kill_tree(pid)
        time.sleep(0 if seen else 0.003)
    while len(left := descendants(os.getpid())) > 1:  # orphans come to us, see main
        for one in left[1:]:
            try:
                os.kill(one, signal.SIGKILL)
                os.waitpid(one, 0)
            except (ProcessLookupError, ChildProcessError):
                pass
    if passed > limit_s:
        raise RuntimeError(f"a run hangs: more than {limit_s} s")
    return -signal.SIGKILL if killed else os.waitstatus_to_exitcode(status)


def digest(data):
    return hashlib.sha1(data).hexdigest()


def content(folder):
    """What must be equal -> {name: list of sums, or of records without what may differ}; of checkpoints the newest."""
    parts = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name.startswith(".stages/") or ".tmp" in name:
            continue
        if path.name in ("log.jsonl", "summary.json", "args.json"):
            records = map(json.loads, path.read_text().splitlines() if name == "log.jsonl" else [path.read_text()])
            parts[name] = [{k: v for k, v in record.items() if k not in VOLATILE} for record in records]
        elif path.suffix == ".pt":
            saved = torch.load(path, weights_only=True)
            tensors = [*saved["model"].values(), *(v for s in saved["optimizer"]["state"].values() for v in s.values())]
            parts["checkpoint"] = [saved["step"], saved["best"], *(digest(v.contiguous().numpy()) for v in tensors)]
        else:
            parts[name] = [digest(path.read_bytes())]
    return parts


def try_command(args, name, make, say):
    """A run left alone; runs that are killed again and again; comparison -> record."""
    rng, folder = random.Random(f"{args.seed} {name}"), Path(args.work) / name
    alone, report = folder / "alone", folder / "writes"
    alone.mkdir(parents=True)
    begun = time.time()
    if code := wait(*start(args, make(alone), alone, report=str(report))):
        raise RuntimeError(f"{name}: exit code {code}; see {alone}.out")
    expected = content(alone / "run")
    writes = sorted(json.loads(line) for line in report.read_text().splitlines())
    first, last = writes[0][0], writes[-1][0]
    lasts, counts = {}, collections.Counter(kind for _, kind in writes)  # seconds until the next write
    for (at, kind), (after, _) in zip(writes, writes[1:] + [(last, "")]):
        lasts.setdefault(kind, after - at)
    events = collections.defaultdict(list)  # of one file: opened, renamed, removed
    for kind in lasts:
        events[re.sub(r"^\w+ |\.old|\.tmp.*|\.N\b.*|(-N-X|/X)?\.(npy|pt)", "", kind)].append(kind)
    plan = [] if args.no_kinds else [rng.choice(kinds) for kinds in events.values()]
    if "synth_speech.py" in make(alone)[0] and not args.fork and not args.no_kinds:
        plan.append("sight of wav/*.tmp")  # written by other processes
    say(f"{name}: alone {time.time() - begun:.0f} s, {len(writes)} writes of {len(events)} kinds, from {first:.1f} s to {last:.1f} s")
    plan += ["moment"] * args.kills
    record = {"first_write_s": first, "last_write_s": last, "writes": len(writes), "kinds": list(events), "kills": [],
              "never_came": [], "runs": [], "starts": 1}
    while plan:
        here, row = folder / f"{len(record['runs']) + 1}", 0
        here.mkdir()
        while True:
            what, spec, moment, seen = plan[0] if plan and row < IN_A_ROW else "nothing", {}, None, None
            if what == "moment":
                moment = first + (last - first) * rng.random()
                shown = f"{moment:.2f} s"
            elif what.startswith("sight"):
                shown, seen = what, lambda: any(here.glob(f"run/{what.split()[-1]}"))
            else:
                after_s = rng.random() * min(lasts.get(what, 0), 3) if what.startswith("write") else 0
                spec = {"kind": what, "number": rng.randint(1, min(2, counts[what])) if row == 0 else 1, "after_s": after_s}
                shown = f"{what} + {1e3 * after_s:.1f} ms"
            record["starts"] += 1
            pid, started = start(args, make(here), here, **spec)
            code = wait(pid, started, moment, seen)
            if code == 0 and row == 0:  # a whole run
                last = min(last, time.time() - started)
            if code == -signal.SIGKILL:
                row += 1
                left = sorted({kind_of("", path, here).strip() for path in here.rglob("*tmp*")})
                record["kills"].append({"run": here.name, "at": shown, "left": left})
                say(f"{name} {here.name}: SIGKILL at {shown}; temporary: {', '.join(left) or '-'}")
            elif code:
                raise RuntimeError(f"{name}: exit code {code}; see {here}.out")
            if what != "nothing" and what != "moment" and code == 0 and row == 0:
                record["never_came"].append(what)  # not even in a run from the start
            if what != "nothing" and (code or row == 0 and what != "moment"):
                plan.pop(0)
            if code == 0:
                break
        found = content(here / "run")
        bad = sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k))
        record["runs"].append({"kills": row, "different": bad})
        say(f"{name} {here.name}: {row} kills, {'DIFFERENT: ' + ', '.join(bad) if bad else 'the same files'}")
        if not bad:
            shutil.rmtree(here)
    return record


def main(args):
    import ctypes
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans of a killed run come to us
    work = Path(args.work).absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.stdout.reconfigure(line_buffering=True)
    begun, lines = time.time(), []

    def say(line):
        lines.append(line)
        print(f"{time.time() - begun:6.0f} s  {line}")

    if args.fork:
        torch.set_num_threads(1)  # forks do not inherit threads
        import eval_mmau, eval_voicebench  # noqa: E401, F401  imported once
    import model as m
    teacher, student = args.llm or m.DEFAULT_LLM, work / "student"
    # not in this process: a lock of its progress bar would be shared by all forks, and held by one that was killed
    maker = multiprocessing.get_context("fork").Process(target=make_student, args=(args.student or m.DEFAULT_STUDENT, student))
    maker.start()
    maker.join()
    speech, small = work / "synth/alone/run", ["--dtype", "float32", "--device", "cpu"]
    questions = (ROOT / "tools/questions.jsonl").read_text().splitlines(True)[:14]
    (work / "questions.jsonl").write_text("".join(questions))

    def synth(folder):
        more = [] if args.llm else ["--wer-sample", "0.5"]
        return "synth_speech.py", ["--input", f"{work}/questions.jsonl", "--teacher", teacher, "--heldout", "4", "--drill", "8",
                                   "--max-new-tokens", "12", "--batch-size", "4", "--workers", "2", "--preview", "3", *more,
                                   *small, "--out", f"{folder}/run"], False

    def train(folder, *parts, ranks=False):
        return "train_kd.py", ["--teacher", teacher, "--student", f"{student}", "--data", f"{speech}/train.jsonl",
                               "--eval-data", f"{speech}/heldout.jsonl", "--warm-start-steps", "2", "--max-steps", "4",
                               "--warm-start-batch-size", "2", "--batch-size", "2", "--global-batch-size", "4",
                               "--save-every", "2", "--log-every", "1", "--lr-warmup-steps", "1",
                               "--workers", "1", "--feature-cache", f"{folder}/features", "--train", *parts, *small,
                               "--out", f"{folder}/run", "--resume"], ranks

    def voicebench(folder):
        return "eval_voicebench.py", ["--student", f"{student}", "--teacher", teacher, "--data", f"{work}/questions", *small,
                                      "--max-new-tokens", "8", "--batch-size", "2", "--out", f"{folder}/run"], False

    def mmau(folder):
        return "eval_mmau.py", ["--student", f"{student}", "--data", f"{work}/mmau.json", "--audio", f"{speech}/wav", *small,
                                "--max-new-tokens", "8", "--batch-size", "2", "--out", f"{folder}/run"], False

    commands = {"synth": synth, "train": lambda folder: train(folder, "adapter", "llm"),
                "train2": lambda folder: train(folder, "encoder", "adapter", ranks=True), "voicebench": voicebench, "mmau": mmau}
    records = {}
    if "synth" not in args.only:
        (work / "synth/alone").mkdir(parents=True)
        wait(*start(args, synth(work / "synth/alone"), work / "synth/alone"))
    for name in args.only:
        if name in ("voicebench", "mmau"):
            write_questions(work, speech)
        records[name] = try_command(args, name, commands[name], say)
        write_log(args, records, lines)
    return int(any(run["different"] for record in records.values() for run in record["runs"]))


def write_log(args, records, lines):
    table = ["| command | kills | starts | runs that ended | different | kills that left temporary files |",
             "|---|---:|---:|---:|---:|---:|"]
    for name, record in records.items():
        kills, runs = record["kills"], record["runs"]
        table.append(f"| {name} | {len(kills)} | {record['starts']} | {len(runs)} | {sum(bool(run['different']) for run in runs)} | "
                     f"{sum(bool(kill['left']) for kill in kills)} |")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}.json").write_text(json.dumps({"seed": args.seed, "commands": records}, indent=1) + "\n")
    Path(f"{args.out}.txt").write_text("\n".join([*table, "", *lines]) + "\n")


def make_student(name, folder):
    """A student with dropout: a run that goes on must draw the same."""
    import model as m
    m.save_student(m.load_student(name), folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["llm"]["attention_dropout"] = settings["encoder"]["dropout"] = 0.1
    (folder / "config.json").write_text(json.dumps(settings))


def write_questions(work, speech):
    """Spoken rows of the manifest as questions of VoiceBench and of MMAU."""
    rows = [json.loads(line) for line in (speech / "train.jsonl").read_text().splitlines()][:6]
    (work / "questions").mkdir(exist_ok=True)
    for row in rows:
        shutil.copy(speech / row["audio"], work / "questions")
    for name, more in (("openbookqa-test", {"reference": "B"}), ("sd-qa-usa", {"reference": "It is so."}), ("commoneval-test", {})):
        lines = [json.dumps({"prompt": row["prompt"], "audio": Path(row["audio"]).name, **more}) for row in rows[:2]]
        (work / f"questions/{name}.jsonl").write_text("\n".join(lines) + "\n")
    items = [{"id": row["id"], "audio_id": Path(row["audio"]).name, "question": "What is asked?", "answer": row["prompt"],
              "choices": [other["prompt"] for other in rows], "task": "speech", "difficulty": "hard"} for row in rows]
    (work / "mmau.json").write_text(json.dumps(items))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        sys.exit(main(get_args()))
