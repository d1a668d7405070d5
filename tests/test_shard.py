"""Two gloo processes, by DDP and by --shard (FSDP2), give the numbers of one process, and its files."""
import json
import os
import subprocess
import sys

import pytest
import test_families as families
import torch
from test_train import ROOT, arguments, assert_logs_agree, both, data, one_thread, read_log, read_rows, train, write_rows  # noqa: F401

import model as m

# Runs one after the other in one process group, since starting Python takes longer than they do;
# a run [argv, n] is stopped by SIGTERM in its n-th step, 0 = never.
DRIVER = f"""
import json, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
import train_kd
dist.init_process_group("gloo")
dist.init_process_group = dist.destroy_process_group = lambda *a, **k: None
update, save, held, views = train_kd.update, train_kd.save_checkpoint, {{}}, []
def saved(args, student, optimizer, *rest):
    states = [t for state in optimizer.state.values() for t in state.values()]
    held[args.out] = [sum(getattr(t, "to_local", lambda: t)().nbytes for t in ts) for ts in (list(student.parameters()), states)]
    save(args, student, optimizer, *rest)
train_kd.save_checkpoint = saved
for argv, last in json.load(open(sys.argv[1])):
    steps = []
    def counted(args, optimizer, *a):
        steps.append(1)
        if not args.shard:
            views.extend(p.grad._is_view() for group in optimizer.param_groups for p in group["params"])
        if len(steps) == last and dist.get_rank():
            os.kill(os.getpid(), signal.SIGTERM)
        return update(args, optimizer, *a)
    train_kd.update = counted
    code = train_kd.main(train_kd.get_args(argv))
    dist.barrier()  # as the script ends: the next run reads what the first process wrote
    assert code == (143 if last else 0), (argv, code)
if dist.get_rank() == 0:
    json.dump([held, all(views)], open(sys.argv[1], "w"))
"""
KINDS = {"full": ["--train", "adapter", "llm", "--lr-llm", "1e-3", "--eval-data", "DATA"], "lora": ["--lora-rank", "4", "--lr-llm", "0.02"],
         "hub": ["--student", "HUB", "--teacher", "HUB", "--train", "encoder", "adapter", "llm", "--eval-data", "DATA"]}
SIZES = dict(one=["--batch-size", "4"], ddp=["--batch-size", "4"], shard=["--batch-size", "4", "--shard", "--gradient-checkpointing"])


@pytest.fixture(scope="module")
def runs(tiny, both, tmp_path_factory):
    """Folder of logs and students: one-*, ddp-*, shard-*, mixed-*, and swapped: begun with shards, gone on with DDP, ended with shards."""
    root = tmp_path_factory.mktemp("runs")
    rows = read_rows(both[0])
    mixed = write_rows(both[0].parent / "mixed.jsonl", [{**row, "audio": row["audio"] if i < 3 else None} for i, row in enumerate(rows)])

    def argv(name, *options, data=both):
        options = [{"DATA": str(both[0]), "HUB": str(root / "hub")}.get(x, x) for x in options]
        return [str(a) for a in arguments(
            tiny, data, root / name, "--student", tiny.student_folder, "--cache", root / ("one" if "one" in name else "two"), "--max-steps", "4",
            "--global-batch-size", "16", "--sound-batch-size", "2", *options)]

    (root / "hub").mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        families.qwen2_audio(root / "hub").save_pretrained(root / "hub")
    plan = [[argv(f"{name}-{kind}", *SIZES[name], *options), 0] for kind, options in KINDS.items() for name in ("ddp", "shard")]
    plan += [[argv("swapped", "--shard"), 2], [argv("swapped", "--resume"), 1], [argv("swapped", "--resume", "--shard"), 0]]
    plan += [[argv(f"mixed-{name}", *SIZES["ddp"], *options, data=mixed), 0] for name, options in MIXED.items()]
    plan += [[argv("cached", *KINDS["full"], "--teacher-cache", str(root / "teacher")), 0]]
    # the teacher alone, by both; then they train on answers of the student's own, which they judge together
    own = write_rows(both[0].parent / "own.jsonl", [{**row, "source": "student" if i % 2 else "sampled"} for i, row in enumerate(rows)])
    judged = ["--channels", "t2t", "--teacher-cache", str(root / "taught")]
    plan += [[argv("taught", *judged, "--teach-only", data=own), 0], [argv("own", *SIZES["ddp"], *judged, data=own), 0]]
    train(*argv("one-own", *SIZES["one"], *judged[:2], data=own))
    for kind, options in KINDS.items():
        train(*argv(f"one-{kind}", *SIZES["one"], *options))
    train(*argv("one-short"))
    for name, options in MIXED.items():
        train(*argv(f"one-mixed-{name}", *SIZES["one"], *[x for x in options if x != "--shard"], data=mixed))
    (root / "plan.json").write_text(json.dumps(plan))
    (root / "driver.py").write_text(DRIVER)
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", root / "driver.py", root / "plan.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    return root


# rows of which few have speech: a process may meet none in a step, and must not let the other wait
MIXED = {"adapter": ["--train", "adapter"], "shard": ["--train", "adapter", "llm", "--shard"],
         "hub": ["--student", "HUB", "--teacher", "HUB", "--shard"]}


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_ddp_and_shards_give_the_same_steps(runs, kind):
    for name in ("ddp", "shard"):
        assert_logs_agree(read_log(runs / f"one-{kind}"), read_log(runs / f"{name}-{kind}"), 3e-5)


@pytest.mark.parametrize("name", MIXED)
def test_a_process_that_meets_no_speech_lets_nobody_wait_and_changes_no_number(runs, name):
    assert_logs_agree(read_log(runs / f"one-mixed-{name}"), read_log(runs / f"mixed-{name}"), 3e-5)


def test_two_processes_hear_what_one_hears(runs):
    one, two = ({path.name: path.read_bytes() for path in (runs / name).rglob("*.safetensors")} for name in ("one", "two"))
    assert one == two and len(one) == 24


def test_two_processes_fill_one_cache_of_the_teacher(runs):
    assert_logs_agree(read_log(runs / "one-full"), read_log(runs / "cached"), 3e-5)
    assert len(list((runs / "teacher").rglob("*"))) == 17


def test_two_processes_teach_alone_and_judge_own_answers_together(runs):
    assert_logs_agree(read_log(runs / "one-own"), read_log(runs / "own"), 3e-5)
    assert len(list((runs / "taught").rglob("*.safetensors"))) == 16 and not list((runs / "taught").glob("*.jsonl"))


@pytest.mark.parametrize("kind", KINDS)
def test_shards_write_the_folders_and_checkpoints_that_others_write(runs, kind):
    one, ddp, sharded = (runs / f"{name}-{kind}" for name in ("one", "ddp", "shard"))
    for folder in ("last", "best")[:1 + (kind != "lora")]:
        a, b = ({str(p.relative_to(out / folder)) for p in (out / folder).rglob("*")} for out in (one, sharded))
        assert a == b and (one / folder / "config.json").read_text() == (sharded / folder / "config.json").read_text()
    a, b = (m.load_student(str(out / "last")).state_dict() for out in (one, sharded))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    a, b = (torch.load(max(out.glob("ckpt-*.pt")), weights_only=True) for out in (ddp, sharded))
    assert {k: v.shape for k, v in a["model"].items()} == {k: v.shape for k, v in b["model"].items()}
    for index, state in a["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.allclose(value, b["optimizer"]["state"][index][key], atol=1e-4)


def test_a_process_holds_its_share_and_ddps_gradients_are_its_buckets(runs):
    held, views = json.loads((runs / "plan.json").read_text())
    for kind in KINDS:
        whole, share = (held[str(runs / f"{name}-{kind}")] for name in ("ddp", "shard"))
        assert all(b < 0.62 * a for a, b in zip(whole[1:], share[1:])) and share[0] < whole[0], (whole, share)  # Whisper is not split
    assert views


def test_a_run_goes_on_with_and_without_shards_in_turn(runs):
    assert_logs_agree(read_log(runs / "one-short"), read_log(runs / "swapped"), 3e-5)
