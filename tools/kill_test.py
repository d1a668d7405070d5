"""
Kill each script at many moments, start the same command again, compare with a run left alone.

  python tools/kill_test.py --work out/kills --out results/kills        # default models, real speech
  python tools/kill_test.py --work out/kills --out out/kills/log --llm LLM --student STUDENT --fork --kills 3

SIGKILL goes to all processes of a run at once: at moments drawn between the first and the last write of the
run left alone, and once at each kind of write (the file is open, or not renamed yet): data, clips, what was
heard and taught, checkpoints, students, answers. A run that was killed is started again and perhaps killed
again; in the end its files must be those of the run left alone: byte for byte, and log.jsonl but for times,
memory and throughput.

Writes  OUT.json (every kill), OUT.txt (a table). Exit code 1: some file differs.
"""
import argparse
import collections
import ctypes
import hashlib
import json
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
import model as m

VOLATILE = ("tokens_per_s", "seconds", "hours", "memory", "out", "cache", "teacher_cache")
IN_A_ROW = 5   # at most so many kills before a run is left to end
LIMIT_S = 900  # a run that takes longer hangs


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--work", required=True, help="folder of all runs; emptied")
    p.add_argument("--out", required=True, help="the log: OUT.json, OUT.txt")
    p.add_argument("--only", nargs="+", default=["synth", "train", "train2", "voicebench", "mmau"], help="train2: two ranks")
    p.add_argument("--kills", type=m.number(int, 0), default=20, help="of each command, at drawn moments")
    p.add_argument("--no-kinds", action="store_true", help="no kills beside these at each kind of write")
    p.add_argument("--llm", default=m.DEFAULT_LLM, help="teacher")
    p.add_argument("--student", default=m.DEFAULT_STUDENT, help="as of train_kd.py")
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
    name = re.sub(r"(best|last)\.tmp/.*", r"\1.tmp/*", os.path.relpath(path, folder))
    name = re.sub(r"(teacher|student|divergence)-[^/]*?\.", "ANSWERS.", name)
    return f"{event} {re.sub('[0-9]+', 'N', re.sub('[0-9a-f]{8,}', 'X', name))}"


def child(spec, script, argv):
    """Run a script as __main__; report its writes below spec["folder"], or kill it at one of them."""
    folder, counts = os.path.abspath(spec["folder"]), collections.Counter()
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
            os.write(report, (json.dumps([time.time() - spec["started"], kind]) + "\n").encode())
        elif kind == spec.get("kind") and counts[kind] == spec["number"]:
            if spec["after_s"]:  # the file will be open by then
                threading.Timer(spec["after_s"], kill_tree, (top,)).start()
            else:
                kill_tree(top)
                time.sleep(60)

    sys.addaudithook(hook)
    sys.argv, sys.path[0] = [script, *argv], str(ROOT)
    runpy.run_path(str(ROOT / script), run_name="__main__")


def fork(script, argv, spec, ranks, output):
    """The command in a fork of this process -> pid. Two ranks are two forks of that fork."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        if ranks:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            here = None
            for rank in ("0", "1"):
                if here != 0:
                    here = os.fork()
                    if here == 0:
                        os.environ.update(RANK=rank, LOCAL_RANK=rank)
            if here:  # both are started
                os._exit(max(abs(os.waitstatus_to_exitcode(os.wait()[1])) for _ in range(2)))
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
    with open(f"{folder}.out", "ab") as output:
        if args.fork:
            return fork(script, argv, spec, ranks, output), spec["started"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if ranks else []
        line = [sys.executable, *torchrun, __file__, "--child", json.dumps(spec), script, *argv]
        return subprocess.Popen(line, stdout=output, stderr=output).pid, spec["started"]


def wait(pid, started, moment=None):
    """Exit code of a run; SIGKILL comes `moment` seconds after its start."""
    killed = False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        passed = time.time() - started
        if done:
            break
        if passed > LIMIT_S or (moment is not None and passed >= moment):
            killed = True
            kill_tree(pid)
        time.sleep(0.003)
    while len(left := descendants(os.getpid())) > 1:  # orphans come to us, see main
        for one in left[1:]:
            try:
                os.kill(one, signal.SIGKILL)
                os.waitpid(one, 0)
            except (ProcessLookupError, ChildProcessError):
                pass
    if passed > LIMIT_S:
        raise RuntimeError(f"a run hangs: more than {LIMIT_S} s")
    return -signal.SIGKILL if killed else os.waitstatus_to_exitcode(status)


def content(folder):
    """What must be equal -> {name: digest, or records without what may differ}."""
    parts = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name.startswith(".stages/") or re.search(r"\.tmp|\.\d+$", name):
            continue
        if path.name in ("log.jsonl", "args.json"):
            lines = path.read_text().splitlines() if name == "log.jsonl" else [path.read_text()]
            parts[name] = [{k: v for k, v in json.loads(x).items() if k not in VOLATILE} for x in lines]
        elif path.suffix == ".pt":  # the newest counts
            saved = torch.load(path, weights_only=True)
            tensors = [*saved["model"].values(), *(v for state in saved["optimizer"]["state"].values() for v in state.values())]
            parts["checkpoint"] = [saved["step"], saved["best"], *(hashlib.sha1(x.numpy().tobytes()).hexdigest() for x in tensors)]
        else:
            parts[name] = m.digest(path)
    return parts


def try_command(args, name, make, say):
    """A run left alone; runs that are killed again and again; comparison -> record."""
    rng, folder = random.Random(f"{args.seed} {name}"), Path(args.work) / name
    alone, report, begun = folder / "alone", folder / "writes", time.time()
    alone.mkdir(parents=True)
    if code := wait(*start(args, make(alone), alone, report=str(report))):
        raise RuntimeError(f"{name}: exit code {code}; see {alone}.out")
    expected, writes = content(alone / "run"), sorted(json.loads(line) for line in report.read_text().splitlines())
    first, last = writes[0][0], writes[-1][0]
    lasts, counts = {}, collections.Counter(kind for _, kind in writes)  # seconds until the next write
    for (at, kind), (after, _) in zip(writes, writes[1:] + [(last, "")]):
        lasts.setdefault(kind, after - at)
    plan = [] if args.no_kinds else list(lasts)
    plan += ["moment"] * args.kills
    say(f"{name}: alone {time.time() - begun:.0f} s, {len(writes)} writes of {len(lasts)} kinds, from {first:.1f} s to {last:.1f} s")
    record = {"first_write_s": first, "last_write_s": last, "writes": len(writes), "kinds": list(lasts), "kills": [],
              "never_came": [], "runs": [], "starts": 1}
    while plan:
        here, row, code = folder / f"{len(record['runs']) + 1}", 0, None
        here.mkdir()
        while code != 0:
            what, spec, moment = plan[0] if plan and row < IN_A_ROW else "nothing", {}, None
            if what == "moment":
                moment = first + (last - first) * rng.random()
                shown = f"{moment:.2f} s"
            elif what != "nothing":
                after_s = rng.random() * min(lasts[what], 3) if what.startswith("write") else 0
                spec = {"kind": what, "number": rng.randint(1, min(2, counts[what])) if row == 0 else 1, "after_s": after_s}
                shown = f"{what} + {1e3 * after_s:.1f} ms"
            record["starts"] += 1
            code = wait(*start(args, make(here), here, **spec), moment)
            if code not in (0, -signal.SIGKILL):
                raise RuntimeError(f"{name}: exit code {code}; see {here}.out")
            if code:
                left = sorted({kind_of("", path, here).strip() for path in here.rglob("*tmp*")})
                record["kills"].append({"run": here.name, "at": shown, "left": left})
                say(f"{name} {here.name}: SIGKILL at {shown}; temporary: {', '.join(left) or '-'}")
                plan.pop(0)
            elif row == 0 and what not in ("nothing", "moment"):
                record["never_came"].append(plan.pop(0))  # not even in a run from the start
            elif row == 0 and what == "moment":
                last = min(last, moment)  # a whole run was quicker
            row += code != 0
        found = content(here / "run")
        bad = sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k))
        record["runs"].append({"kills": row, "different": bad})
        say(f"{name} {here.name}: {row} kills, {'DIFFERENT: ' + ', '.join(bad) if bad else 'the same files'}")
        if not bad:
            shutil.rmtree(here)
    return record


# ---- what is run ----

def commands(args, work, student):
    """-> {name: function from a folder to (script, arguments, two ranks?)}"""
    speech, small = work / "synth/alone/run", ["--dtype", "float32", "--device", "cpu"]

    def synth(folder):
        measured = ["--max-wer", "9"] if args.student == m.DEFAULT_STUDENT else []
        return "synth_speech.py", ["--input", f"{work}/questions.jsonl", "--teacher", args.llm, "--heldout", "3", "--takes", "2",
                                   "--max-new-tokens", "12", "--batch-size", "4", *measured, *small,
                                   "--out", f"{folder}/run"], False

    def train(folder, *more, ranks=False):
        return "train_kd.py", ["--teacher", args.llm, "--student", f"{student}", "--data", f"{speech}/train.jsonl",
                               f"{speech}/sounds.jsonl", "--eval-data", f"{speech}/heldout.jsonl", "--max-steps", "4",
                               "--batch-size", "2", "--global-batch-size", "4", "--sound-batch-size", "1", "--save-every", "1",
                               "--lr-warmup-steps", "1", *small, *more,
                               "--cache", f"{folder}/run/cache", "--out", f"{folder}/run", "--resume"], ranks

    def voicebench(folder):
        return "eval_voicebench.py", ["--student", f"{student}", "--teacher", args.llm, "--data", f"{work}/questions", *small,
                                      "--max-new-tokens", "8", "--batch-size", "2", "--out", f"{folder}/run"], False

    def mmau(folder):
        return "eval_mmau.py", ["--student", f"{student}", "--data", f"{work}/mmau.json", "--audio", f"{speech}/wav", *small,
                                "--max-new-tokens", "8", "--batch-size", "2", "--out", f"{folder}/run"], False

    return {"synth": synth, "train": lambda folder: train(folder, "--teacher-cache", f"{folder}/run/taught"),
            "train2": lambda folder: train(folder, ranks=True), "voicebench": voicebench, "mmau": mmau}


def make_student(name, folder):
    """A student with dropout: a run that goes on must draw the same."""
    m.save_student(m.load_student(name), folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["llm"]["attention_dropout"] = 0.1
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


def main(args):
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans of a killed run come to us
    work = Path(args.work).absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    sys.stdout.reconfigure(line_buffering=True)
    begun, lines, records = time.time(), [], {}

    def say(line):
        lines.append(line)
        print(f"{time.time() - begun:6.0f} s  {line}")

    if args.fork:
        torch.set_num_threads(1)  # forks do not inherit threads
        import eval_mmau  # noqa: F401  with all the others, once
    # not in this process: a lock of its progress bar would be shared by all forks, and held by one that was killed
    pid = os.fork()
    if not pid:
        make_student(args.student, work / "student")
        os._exit(0)
    os.waitpid(pid, 0)
    questions = (ROOT / "tools/questions.jsonl").read_text().splitlines(True)[:10]
    (work / "questions.jsonl").write_text("".join(questions))
    make = commands(args, work, work / "student")
    if "synth" not in args.only:
        (work / "synth/alone").mkdir(parents=True)
        wait(*start(args, make["synth"](work / "synth/alone"), work / "synth/alone"))
    for name in args.only:
        if name.startswith("train"):
            subprocess.run([sys.executable, ROOT / "tools/sound_questions.py", work / "synth/alone/run"], check=True)
        if name in ("voicebench", "mmau"):
            write_questions(work, work / "synth/alone/run")
        records[name] = try_command(args, name, make[name], say)
        write_log(args, records, lines)
    return int(any(run["different"] for record in records.values() for run in record["runs"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        sys.exit(main(get_args()))
