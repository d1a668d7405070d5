"""--shard (FSDP2) on two gloo processes gives the numbers of DDP and of one process, and its files are theirs."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model as m
import train_kd
from test_memory_plan import memory_plan
from test_train import ROOT, arguments, assert_logs_agree, data, one_thread, read_log, train  # noqa: F401

# Nothing is spelled, all is one sound: which token is heard is a choice, and rounding alone decides a near tie.
# Runs one after the other in one process group, since starting Python takes longer than they do;
# a run [argv, n] is stopped by SIGTERM in its n-th step, 0 = never.
DRIVER = f"""
import json, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
import model, train_kd
model.read_path = lambda path, processors: ("", [(-1, 0, len(path) - 1)])
dist.init_process_group("gloo")
dist.init_process_group = dist.destroy_process_group = lambda *a: None
count, save, held = train_kd.count_tokens, train_kd.save_checkpoint, {{}}
def saved(out, student, optimizer, *rest):
    states = [t for state in optimizer.state.values() for t in state.values()]
    held[str(out)] = [sum(getattr(t, "to_local", lambda: t)().nbytes for t in ts) for ts in (list(student.parameters()), states)]
    save(out, student, optimizer, *rest)
train_kd.save_checkpoint = saved
for argv, last in json.load(open(sys.argv[1])):
    steps = []
    def counted(*a):
        steps.append(1)
        if len(steps) == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return count(*a)
    train_kd.count_tokens = counted
    code = train_kd.main(train_kd.get_args(argv))
    assert code == (143 if last else 0), code
if dist.get_rank() == 0:
    json.dump(held, open(sys.argv[1], "w"))
"""
STEPS = ["--warm-start-steps", "2", "--warm-start-lr", "1e-4", "--max-steps", "18", "--global-batch-size", "16",
         "--batch-size", "4", "--save-every", "100"]
KINDS = {"full": ["--train", "encoder", "adapter", "llm", "--lr-llm", "1e-3"], "lora": ["--lora-rank", "4", "--lr-llm", "0.02"]}
SHARD = ["--shard", "--gradient-checkpointing"]
SHORT = ["--max-steps", "4", "--warm-start-steps", "0", "--global-batch-size", "8"]


@pytest.fixture(scope="module")
def runs(tiny, data, tmp_path_factory):
    """Folder of logs and students: one-*, ddp-*, shard-*, and swapped: begun with shards, gone on with DDP, ended with shards."""
    root = tmp_path_factory.mktemp("runs")

    def argv(name, *options, batch=8):
        return [str(a) for a in arguments(
            tiny, data, root / name, "--student", tiny.student, "--eval-data", data, "--feature-cache", root / "features", *STEPS,
            "--warm-start-batch-size", batch, *options)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "read_path", lambda path, processors: ("", [(-1, 0, len(path) - 1)]))
        for kind, options in KINDS.items():
            train(*argv(f"one-{kind}", *options, batch=16))
        train(*argv("one-short", *SHORT))
    plan = [[argv(f"{name}-{kind}", *more, *options), 0] for kind, options in KINDS.items()
            for name, more in (("ddp", []), ("shard", SHARD))]
    plan += [[argv("swapped", *SHORT, "--shard"), 2], [argv("swapped", *SHORT, "--resume"), 1],
             [argv("swapped", *SHORT, "--resume", "--shard"), 0]]
    (root / "plan.json").write_text(json.dumps(plan))
    (root / "driver.py").write_text(DRIVER)
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", root / "driver.py", root / "plan.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_ddp_and_shards_give_the_same_twenty_steps(runs, kind):
    for name in ("ddp", "shard"):
        assert_logs_agree(read_log(runs / f"one-{kind}"), read_log(runs / f"{name}-{kind}"), 3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_write_the_folders_that_one_process_writes(runs, kind):
    one, sharded = (runs / f"{name}-{kind}" for name in ("one", "shard"))
    for folder in ("last", "best"):
        a, b = ({str(p.relative_to(out / folder)) for p in (out / folder).rglob("*")} for out in (one, sharded))
        assert a == b
        assert (one / folder / "config.json").read_text() == (sharded / folder / "config.json").read_text()
    a, b = (m.load_student(str(out / "last")).state_dict() for out in (one, sharded))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a) and len(a) == len(b)


def test_a_checkpoint_of_shards_is_that_of_ddp_and_holds_what_trains(runs):
    for kind in KINDS:
        ddp, sharded = (torch.load(max((runs / f"{name}-{kind}").glob("ckpt-*.pt")), weights_only=True) for name in ("ddp", "shard"))
        assert {k: v.shape for k, v in ddp["model"].items()} == {k: v.shape for k, v in sharded["model"].items()}
        for index, state in ddp["optimizer"]["state"].items():
            for key, value in state.items():
                assert torch.allclose(value, sharded["optimizer"]["state"][index][key], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_holds_its_share_as_the_memory_plan_says(tiny, runs, kind):
    held = json.loads((runs / "plan.json").read_text())[str(runs / f"shard-{kind}")]
    options = {"full": dict(train=("encoder", "adapter", "llm")), "lora": dict(lora_rank=4)}[kind]
    table = memory_plan.plan(tiny.student, tiny.llm, world=2, shard=True, dtype="float32", **options)
    assert held == [table["student weights"], table["optimizer"]]


def test_a_run_goes_on_with_and_without_shards_in_turn(runs):
    assert_logs_agree(read_log(runs / "one-short"), read_log(runs / "swapped"), 1e-5)


def sharded_arguments(monkeypatch, *argv):
    monkeypatch.setenv("RANK", "0")
    return train_kd.get_args([*map(str, argv), "--shard"])


@pytest.mark.parametrize("key", ["prompt", "audio", "response"])
def test_a_row_that_would_make_processes_wait_for_each_other_is_refused(tiny, data, tmp_path, monkeypatch, key):
    rows = train_kd.read_manifest(data)
    rows[3][key] = None
    args = sharded_arguments(monkeypatch, *arguments(tiny, data, tmp_path))
    with pytest.raises(ValueError, match="--shard: row train-003 lacks prompt, audio or response"):
        train_kd.usable_rows(args, rows, 8, 8)


@pytest.mark.parametrize("options", [["--dtype", "float16"], ["--compile"]])
def test_what_shards_do_not_support_is_refused(tiny, data, tmp_path, monkeypatch, capsys, options):
    with pytest.raises(SystemExit) as stop:
        sharded_arguments(monkeypatch, *arguments(tiny, data, tmp_path, *options))
    assert stop.value.code == 2 and "--shard" in capsys.readouterr().err


def test_shards_without_torchrun_are_refused(tiny, data, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        train_kd.get_args([*map(str, arguments(tiny, data, tmp_path)), "--shard"])
    assert "needs torchrun" in capsys.readouterr().err
