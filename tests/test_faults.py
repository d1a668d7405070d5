"""Kills, SIGTERM, dead processes, full disks: a script stops clearly, keeps its last good state, and goes on to the same end."""
import argparse
import contextlib
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_train import read_log

import model as m
import train_kd

sys.path.append(str(ROOT / "tools"))
import soak  # noqa: E402

# a server that has imported the scripts once and forks for each run
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_kd", "synth_speech", "eval_mmau"])


# ---- what happens in a run ----

def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def sigterm_to_all():
    """As torchrun and job schedulers send it: worker processes get it too."""
    os.killpg(0, signal.SIGTERM)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def sigkill():
    os.kill(os.getpid(), signal.SIGKILL)


def run(script, argv, output, rank=None, port=0, at=None, limits=()):
    """The script, in a process of its own; `at` = (function of model.py, Whisper or SpeechLLM, number of its call, what happens then)."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as it is outside of a server of forks
    multiprocessing.get_context = lambda *_: multiprocessing.context._concrete_contexts["fork"]  # a spawned one imports torch
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    if rank is not None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if at:
        name, number, happens = at
        owner, calls = next(x for x in (m, m.Whisper, m.SpeechLLM) if name in vars(x)), []
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                happens()
            return original(*args, **kwargs)

        setattr(owner, name, counted)
    for what, value in limits:
        resource.setrlimit(getattr(resource, what), (value, value))
    sys.argv = [script, *map(str, argv)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def start(script, argv, output, ranks=0, at=None, limits=()):
    """-> processes; `at` concerns all ranks if it is a signal to all, else the last one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = range(ranks) if ranks else [None]
    processes = []
    for rank in places:
        mine = at if rank in (None, ranks - 1) or at and at[2] is sigterm_to_all else None
        processes.append(FORKS.Process(target=run, args=(script, argv, output, rank, port, mine, limits)))
        processes[-1].start()
    return processes


def finish(processes, seconds=60):
    """Exit codes; no run may hang."""
    for process in processes:
        process.join(seconds)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert not hanging, "a process hangs"
    return [process.exitcode for process in processes]


# ---- training ----

OPTIONS = ["--max-steps", "3", "--batch-size", "2", "--dtype", "float32", "--eval-every", "1", "--save-every", "1", "--lr-warmup-steps", "1",
           "--device", "cpu"]


@pytest.fixture(scope="module")
def options(tiny, tmp_path_factory):
    """Every option but --out; 48 rows to measure on are three batches."""
    folder = tmp_path_factory.mktemp("faults")
    return ["--teacher", tiny.llm, "--student", tiny.student_folder, "--data", tiny.manifest(folder, 16),
            "--eval-data", tiny.manifest(folder, 48, name="heldout", seed=1), *OPTIONS]


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory):
    """{processes: folder of a run that is left alone}"""
    folder, runs = tmp_path_factory.mktemp("alone"), {}

    def of(ranks):
        if ranks not in runs:
            runs[ranks] = folder / f"run{ranks}"
            assert set(finish(start("train_kd.py", [*options, "--out", runs[ranks]], folder / "output", ranks))) == {0}, (
                (folder / "output").read_text())
        return runs[ranks]

    return of


def train(options, folder, *more, **how):
    """-> exit codes, what was printed"""
    output = Path(f"{folder.parent}.out")
    output.unlink(missing_ok=True)
    codes = finish(start("train_kd.py", [*options, "--out", folder, *more], output, **how))
    return codes, output.read_text()


def assert_goes_on(options, folder, reference, ranks=0):
    """The same command with --resume ends as the run that was left alone."""
    codes, output = train(options, folder, "--resume", ranks=ranks)
    assert set(codes) == {0}, output
    assert read_log(folder) == read_log(reference)
    for name in ("last/model.safetensors", "best/model.safetensors"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    return output


def newest(folder):
    return max(folder.glob("ckpt-*.pt"), default=None)


def assert_stops(options, folder, message, **how):
    """Exit code 2, one line that says why; every checkpoint left is whole."""
    codes, output = train(options, folder, "--resume", **how)
    assert 2 in codes and 0 not in codes, (codes, output)
    last = output.strip().splitlines()[-1]
    assert last.startswith("train_kd.py: ") and re.search(message, last), output
    assert all(path.stem.endswith(m.digest(path)[:16]) for path in folder.glob("ckpt-*"))
    return codes


# calls of SpeechLLM.forward: 3 batches x 2 channels of evaluation, of 2 ranks 2 x 2; 2 channels of a step
@pytest.mark.parametrize("ranks, at, step", [
    (0, ("hear", 1, sigterm_to_all), None), (2, ("forward", 3, sigterm), 0), (0, ("forward", 7, sigterm_to_all), 1), (0, ("forward", 7, ctrl_c), 1)],
    ids=["hearing", "evaluation-2, one of them", "distilling", "Ctrl-C"])
def test_sigterm_stops_soon_says_how_to_go_on_and_exits_143(options, alone, tmp_path, ranks, at, step):
    cache = ["--cache", tmp_path / "cache"]
    codes, output = train([*options, *cache], tmp_path / "run", ranks=ranks, at=at)
    assert set(codes) == {143} and "stopped" in output and "goes on" in output, (codes, output)
    assert (newest(tmp_path / "run") is None) == (not step)
    if step:
        assert newest(tmp_path / "run").name.startswith(f"ckpt-{step:06d}")
    assert_goes_on([*options, *cache], tmp_path / "run", alone(ranks), ranks)


def test_a_dead_rank_ends_the_other_with_a_message_and_the_run_goes_on(options, alone, tmp_path):
    codes = assert_stops(options, tmp_path / "run", "Connection", ranks=2, at=("forward", 7, sigkill))
    assert sorted(codes) == [-signal.SIGKILL, 2]
    assert_goes_on(options, tmp_path / "run", alone(2), 2)


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    """A file system of so many kB; yields a function that mounts it again with other options."""
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no right to mount a small file system: {error}")
    try:
        yield lambda how: subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("kilobytes, message", [
    (60, "No space left"), (700, r"ckpt.tmp cannot be written .*0\.00 GiB are free")],
    ids=["best student", "checkpoint"])
def test_a_full_disk_stops_with_one_line_and_with_room_the_run_goes_on(options, alone, tmp_path, kilobytes, message):
    with small_disk(tmp_path / "disk", kilobytes) as again:
        run = tmp_path / "disk/run"
        assert_stops(options, run, message)
        again("ro,size=9000k")
        assert_stops(options, run, "Read-only file system|no folder that can be written to")
        again("rw,size=9000k")
        assert_goes_on(options, run, alone(0))


@pytest.mark.parametrize("damage", ["cut", "edited"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(options, alone, tmp_path, damage):
    run = shutil.copytree(alone(0), tmp_path / "run")
    new = newest(run)
    data = bytearray(new.read_bytes())
    data[len(data) // 2] ^= 1
    new.write_bytes(data if damage == "edited" else data[:-1])
    output = assert_goes_on(options, run, alone(0))
    assert f"going on from step 2; damaged: {new.name}" in output
    for path in run.glob("ckpt-*.pt"):
        path.write_bytes(b"")
    codes, output = train(options, run, "--resume")
    assert codes == [2] and "no checkpoint has the SHA-256 that its name says (2 tried)" in output


def test_any_changed_byte_changes_the_sum_in_the_name(alone, tmp_path):
    path = newest(alone(0))
    data, copy = path.read_bytes(), tmp_path / path.name
    for at in range(0, len(data), len(data) // 50):
        copy.write_bytes(data[:at] + bytes([data[at] ^ 128]) + data[at + 1:])
        assert not copy.stem.endswith(m.digest(copy)[:16])
    copy.write_bytes(data)
    assert copy.stem.endswith(m.digest(copy)[:16])


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    lines = [{"step": 0, "eval_gap": 1}, *({"step": step, key: 1} for step, key in ((1, "loss"), (2, "loss"), (2, "eval_gap"), (3, "loss")))]
    path = tmp_path / "log.jsonl"
    for step, kept in ((0, 0), (1, 2), (2, 3), (3, 5)):  # the evaluation of a checkpoint's step is repeated
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "eval')
        train_kd.begin_log(argparse.Namespace(out=str(tmp_path)), step)
        assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:kept]


# ---- data and evaluation ----

def script(name, argv, folder, output, **how):
    output.unlink(missing_ok=True)
    codes = finish(start(name, [*argv, "--out", folder], output, **how))
    return codes[0], output.read_text()


@pytest.fixture(scope="module")
def commands(tiny, tmp_path_factory):
    """{script: options without --out}, small enough for a second each."""
    folder = tmp_path_factory.mktemp("commands")
    prompts = "".join(json.dumps({"prompt": f"{start} {end}?"}) + "\n" for start in ("Who knows", "What is") for end in "xyz")
    (folder / "prompts.jsonl").write_text(prompts)
    path = tiny.manifest(folder, 6)
    items = [{"id": row["id"], "audio_id": Path(row["audio"]).name, "question": "Who?", "choices": ["He", "She"], "answer": "He"}
             for row in map(json.loads, path.read_text().splitlines())]
    (folder / "mmau.json").write_text(json.dumps(items))
    return {"synth_speech.py": ["--input", folder / "prompts.jsonl", "--teacher", tiny.llm, "--dtype", "float32", "--batch-size", "3",
                                "--max-new-tokens", "8", "--workers", "2", "--device", "cpu"],
            "eval_mmau.py": ["--student", tiny.student_folder, "--data", folder / "mmau.json", "--audio", folder / "wav",
                             "--batch-size", "2", "--max-new-tokens", "4", "--dtype", "float32", "--device", "cpu"]}


@pytest.mark.parametrize("name, result", [("synth_speech.py", "train.jsonl"), ("eval_mmau.py", "predictions.json")])
def test_data_and_evaluation_survive_a_full_and_a_read_only_disk(commands, tmp_path, name, result):
    assert script(name, commands[name], tmp_path / "alone", tmp_path / "output")[0] == 0
    with small_disk(tmp_path / "disk", 100 if name == "synth_speech.py" else 8) as again:
        for how, message in ((None, "No space left"), ("ro,size=9000k", "Read-only file system|no folder that can be written to")):
            if how:
                again(how)
            code, output = script(name, commands[name], tmp_path / "disk/run", tmp_path / "output")
            last = output.strip().splitlines()[-1]
            assert code == 2 and last.startswith(name) and re.search(message, last), output
        again("rw,size=9000k")
        assert script(name, commands[name], tmp_path / "disk/run", tmp_path / "output")[0] == 0
        assert (tmp_path / "disk/run" / result).read_bytes() == (tmp_path / "alone" / result).read_bytes()


@pytest.mark.parametrize("name, stop", [("synth_speech.py", sigterm_to_all), ("eval_mmau.py", sigterm_to_all), ("synth_speech.py", ctrl_c)])
def test_sigterm_of_data_and_evaluation_exits_143(commands, tmp_path, name, stop):
    code, output = script(name, commands[name], tmp_path / "run", tmp_path / "output", at=("generate", 2, stop))
    assert code == 143 and "stopped; the same command goes on" in output, output
    assert script(name, commands[name], tmp_path / "run", tmp_path / "output")[0] == 0


def test_killed_at_any_moment_every_script_goes_on_to_the_same_files(tiny, tmp_path):
    command = [sys.executable, ROOT / "tools/kill_test.py", "--work", tmp_path / "work", "--out", tmp_path / "kills", "--fork",
               "--kills", 3, "--no-kinds", "--llm", tiny.llm, "--student", tiny.student_folder]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    for name, record in json.loads((tmp_path / "kills.json").read_text())["commands"].items():
        assert len(record["kills"]) == 3 and not any(run["different"] for run in record["runs"]), name


# ---- long runs ----

def test_in_some_hundred_steps_neither_open_files_nor_memory_grow(options, tmp_path):
    long = ["--max-steps", "240", "--eval-every", "300", "--save-every", "100"]
    codes = finish(start("tools/soak.py", [*options, *long, "--out", tmp_path / "run"], tmp_path / "output"))
    assert codes == [0], (tmp_path / "output").read_text()
    starts = soak.read(tmp_path / "run/log.jsonl")
    assert len(starts) == 1 and len(starts[0]) > 100  # how many depends on the speed of the first steps
    assert not soak.verdict(starts, "open_files")[1]
    assert starts[0][-1]["resident"] - starts[0][0]["resident"] < 0.03  # GiB


def soak_log(path, grow, hours=10, lines=200):
    records = [{"step": i, "hours": hours * i / lines, "resident": 3 + 0.02 * math.sin(7 * i) + grow * hours * i / lines,
                "open_files": 30 + i % 2, "workers": 1} for i in range(1, lines + 1)]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"step": lines, "eval_gap": 0}, *records]))
    return path


@pytest.mark.parametrize("grow", [0, 0.05])
def test_soak_tells_growth_from_noise_also_over_a_restart(tmp_path, capsys, grow):
    assert soak.main([str(soak_log(tmp_path / "log.jsonl", grow))]) == (grow > 0)
    memory, files, workers = capsys.readouterr().out.splitlines()
    rate, low, high = (float(x) for x in re.findall(r"[-+]\d+\.\d+", memory))
    assert low <= grow <= high and rate == pytest.approx(grow, abs=0.005)
    assert memory.endswith("grows" if grow else "flat") and files.endswith("flat") and workers.endswith("flat")


def test_soak_asks_for_more_lines(tmp_path):
    with pytest.raises(ValueError, match="4 lines .* too few"):
        soak.main([str(soak_log(tmp_path / "log.jsonl", 0, lines=2))])
