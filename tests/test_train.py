"""train_kd.py end to end on tiny random models: what must be equal is equal, what must stop stops, what is stopped goes on."""
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import model as m
import train_kd

ROOT = Path(__file__).resolve().parent.parent
VOLATILE = ("tokens_per_s", "memory", "wait", "padding", "resident", "open_files", "workers", "hours")


def arguments(tiny, data, out, *more):
    return ["--teacher", str(tiny.llm), "--student", str(tiny.student_folder), "--data", str(data), "--out", str(out),
            "--dtype", "float32", "--batch-size", "4", "--log-every", "1", "--workers", "0", "--lr-warmup-steps", "2", "--device", "cpu", *more]


def train(*argv):
    return train_kd.main(train_kd.get_args([str(a) for a in argv]))


def launch(argv, processes=0, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*command, str(ROOT / "train_kd.py"), *map(str, argv)], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, **options)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def read_log(out):
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in VOLATILE} for record in records]


def checkpoints(folder):
    return sorted(folder.glob("run/ckpt-*.pt"))


def assert_logs_agree(a, b, tolerance):
    assert [sorted(x) for x in a] == [sorted(x) for x in b] and len(a) > 0
    for x, y in zip(a, b):
        for key in x:
            if isinstance(x[key], float):
                assert math.isclose(x[key], y[key], rel_tol=tolerance, abs_tol=tolerance), (key, x, y)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are launched: sums over another number of threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    return tiny.manifest(tmp_path_factory.mktemp("manifest"), 16)


FULL = ["--train", "adapter", "llm", "--warm-start-steps", "2", "--warm-start-batch-size", "4", "--max-steps", "4", "--eval-every", "2"]


@pytest.fixture(scope="module")
def reference_run(tiny, data, tmp_path_factory):
    """One uninterrupted run, both phases, global batch 8 in two micro-batches of 4."""
    out = tmp_path_factory.mktemp("reference") / "run"
    assert train(*arguments(tiny, data, out, *FULL, "--global-batch-size", "8", "--eval-data", data)) == 0
    return out


def test_the_log_has_the_documented_keys_and_the_losses_fall(reference_run):
    records = read_log(reference_run)
    steps, evals = [r for r in records if "loss" in r], [r for r in records if "eval_kl_s2t" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6] and [r["step"] for r in evals] == [2, 4, 6]
    for key in ("loss", "ce_t2t", "kd_t2t", "ce_s2t", "kd_s2t", "ctc", "lr", "grad_norm"):
        assert all(math.isfinite(r[key]) for r in steps), key
    for key in ("kl", "kl8", "agree", "agree8"):
        assert all(f"eval_{key}_{channel}" in r for r in evals for channel in ("t2t", "s2t")), key
    assert steps[1]["ctc"] < steps[0]["ctc"]
    assert all(r["eval_gap8"] == pytest.approx(r["eval_kl8_s2t"] - r["eval_kl8_t2t"]) for r in evals)
    assert {p.name for p in reference_run.iterdir()} >= {"last", "best", "log.jsonl", "samples.jsonl", "args.json"}
    assert sorted(p.name[:11] for p in reference_run.glob("ckpt*")) == ["ckpt-000004", "ckpt-000006"]


def test_before_training_the_text_channel_is_the_teacher_itself(reference_run):
    first = next(r for r in read_log(reference_run) if "eval_kl_t2t" in r)
    assert first["eval_kl_t2t"] == pytest.approx(0, abs=1e-6) and first["eval_agree_t2t"] == 1
    assert first["eval_kl_s2t"] > 1e-4


def test_accumulation_gives_the_losses_of_the_whole_batch(tiny, data, tmp_path, reference_run):
    train(*arguments(tiny, data, tmp_path / "run", *FULL, "--batch-size", "8", "--eval-data", data))
    assert_logs_agree(read_log(tmp_path / "run"), read_log(reference_run), 1e-5)


@pytest.mark.parametrize("train_parts", [["adapter", "llm"], ["encoder", "adapter", "llm"], ["adapter"]])
def test_two_processes_give_the_losses_of_one(tiny, data, tmp_path, train_parts):
    options = ["--train", *train_parts, "--warm-start-steps", "2", "--max-steps", "3", "--eval-data", data]
    train(*arguments(tiny, data, tmp_path / "one", *options, "--global-batch-size", "8", "--warm-start-batch-size", "8"))
    process = launch(arguments(tiny, data, tmp_path / "two", *options, "--warm-start-batch-size", "4", "--feature-cache", tmp_path), processes=2)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert_logs_agree(read_log(tmp_path / "one"), read_log(tmp_path / "two"), 1e-5)


def test_a_rank_without_speech_does_not_hang_the_others(tiny, data, tmp_path):
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    for row in rows:
        row["audio"] = row["audio"] if row["id"] == rows[0]["id"] else None  # one row has sound, 15 are text only
    manifest = Path(data).parent / "mostly-text.jsonl"
    manifest.write_text("".join(json.dumps(r) + "\n" for r in rows))
    process = launch(arguments(tiny, manifest, tmp_path / "run", "--max-steps", "2"), processes=2)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output


@pytest.mark.parametrize("after_steps", [1, 3])
def test_killed_and_resumed_gives_the_same_log_and_weights(tiny, data, tmp_path, reference_run, after_steps):
    argv = arguments(tiny, data, tmp_path / "run", *FULL, "--global-batch-size", "8", "--eval-data", data, "--save-every", "1", "--resume")
    process = launch(argv)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "run/log.jsonl").exists() and len((tmp_path / "run/log.jsonl").read_text().splitlines()) > after_steps:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert checkpoints(tmp_path) or after_steps == 1
    assert train(*argv) == 0
    assert read_log(tmp_path / "run") == read_log(reference_run)
    a, b = (m.load_student(str(run / "last")).state_dict() for run in (tmp_path / "run", reference_run))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_sigterm_saves_says_how_to_go_on_and_exits_143(tiny, data, tmp_path):
    process = launch(arguments(tiny, data, tmp_path / "run", "--max-steps", "100000"))
    for line in process.stdout:
        if line.startswith("distil     2/"):
            process.send_signal(signal.SIGTERM)
            break
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143 and "--resume" in output
    assert torch.load(checkpoints(tmp_path)[-1], weights_only=True)["step"] >= 2


def test_resume_with_other_options_is_refused(tiny, data, reference_run):
    argv = arguments(tiny, data, reference_run, *FULL, "--global-batch-size", "8", "--eval-data", data)
    with pytest.raises(ValueError, match="add --resume"):
        train(*argv)
    with pytest.raises(ValueError, match=r"lr_llm 2e-05 -> 0.1"):
        train(*argv, "--resume", "--lr-llm", "0.1")


def test_a_loss_that_is_not_finite_stops_with_step_and_rows_and_keeps_the_checkpoint(tiny, data, tmp_path, monkeypatch):
    argv = arguments(tiny, data, tmp_path / "run", "--max-steps", "3", "--save-every", "1")
    original, calls = losses.fused_ce_kd, []

    def poisoned(**inputs):
        calls.append(1)
        loss, ce, kd = original(**inputs)
        return (loss * float("nan"), ce, kd) if len(calls) > 2 else (loss, ce, kd)  # two channels a step

    monkeypatch.setattr(losses, "fused_ce_kd", poisoned)
    with pytest.raises(RuntimeError, match=r"loss nan in step 2.*'train-0\d\d'.*last good state"):
        train(*argv)
    assert torch.load(checkpoints(tmp_path)[-1], weights_only=True)["step"] == 1


def test_the_teacher_is_read_once_for_both_channels(tiny, data, tmp_path, monkeypatch):
    original, calls = train_kd.teacher_rows, []
    monkeypatch.setattr(train_kd, "teacher_rows", lambda *a: calls.append(1) or original(*a))
    train(*arguments(tiny, data, tmp_path / "run", "--max-steps", "2", "--global-batch-size", "8"))
    assert len(calls) == 4  # 2 steps x 2 micro-batches, not x 2 channels


def test_only_what_is_named_trains(tiny, data, tmp_path):
    train(*arguments(tiny, data, tmp_path / "run", "--max-steps", "2", "--train", "adapter"))
    before, after = m.load_student(str(tiny.student_folder)).state_dict(), m.load_student(str(tmp_path / "run/last")).state_dict()
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"adapter"}


def test_answers_are_tokenised_once_and_a_cut_answer_teaches_no_stopping(tiny):
    tokenizer = m.load_llm(str(tiny.llm))[1]
    row = {"response": "The capital of France is Paris.", "reference": "Paris", "finish": "stop"}
    whole = train_kd.answer_ids(tokenizer, row, "response", 100)
    assert whole[-1] == m.end_token(tokenizer)
    assert train_kd.answer_ids(tokenizer, {**row, "finish": "length"}, "response", 100) == whole[:-1]
    assert train_kd.answer_ids(tokenizer, row, "response", 3) == whole[:3]
    assert train_kd.answer_ids(tokenizer, row, "reference", 100)[-1] == m.end_token(tokenizer)


def test_rows_without_text_get_cross_entropy_only_and_captions_are_not_spelled(tiny, data, tmp_path):
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    for i, row in enumerate(rows):
        if i % 2:
            row["prompt"] = None
        else:
            row["instruction"] = "What is heard here?"
    manifest = Path(data).parent / "sounds.jsonl"
    manifest.write_text("".join(json.dumps(r) + "\n" for r in rows))
    train(*arguments(tiny, manifest, tmp_path / "run", "--max-steps", "2", "--global-batch-size", "8"))
    records = read_log(tmp_path / "run")
    assert all(r["ctc"] == 0 and r["ce_s2t"] > 0 for r in records) and any(r["kd_s2t"] > 0 for r in records)


def test_labels_choose_the_sequence_that_ce_and_kl_use(tiny, data, tmp_path):
    rows = [{**json.loads(line), "reference": "Yes."} for line in Path(data).read_text().splitlines()]
    manifest = Path(data).parent / "labelled.jsonl"
    manifest.write_text("".join(json.dumps(r) + "\n" for r in rows))
    dataset = train_kd.Rows(train_kd.read_manifest(manifest), m.load_student(str(tiny.student_folder)), m.load_llm(str(tiny.llm))[1],
                            train_kd.get_args(arguments(tiny, manifest, tmp_path, "--labels", "reference")))
    assert dataset.student.tokenizer.decode(dataset[0]["answer"], skip_special_tokens=True) == "Yes."


def test_system_and_instruction_reach_teacher_and_student_alike(tiny, data, tmp_path):
    rows = [{**json.loads(line), "system": "Answer like a pirate.", "instruction": "Translate:"} for line in Path(data).read_text().splitlines()]
    manifest = Path(data).parent / "system.jsonl"
    manifest.write_text("".join(json.dumps(r) + "\n" for r in rows))
    student = m.load_student(str(tiny.student_folder))
    item = train_kd.Rows(train_kd.read_manifest(manifest), student, student.tokenizer, train_kd.get_args(arguments(tiny, manifest, tmp_path)))[0]
    assert item["teacher_prompt"] == item["before"] + item["said"] + item["after"]
    text = student.tokenizer.decode(item["teacher_prompt"])
    assert "pirate" in text and "Translate:" in text


def test_the_batch_plan_needs_nothing_but_its_arguments_and_uses_each_row_once_an_epoch():
    lengths = [(7 * i) % 50 for i in range(103)]
    plan = train_kd.plan_batches(lengths, 4, 8, 30, seed=1)
    assert plan == train_kd.plan_batches(lengths, 4, 8, 30, seed=1) != train_kd.plan_batches(lengths, 4, 8, 30, seed=2)
    assert plan[:20] == train_kd.plan_batches(lengths, 4, 8, 20, seed=1)
    assert plan[0][0] + plan[0][1] == train_kd.plan_batches(lengths, 8, 8, 30, seed=1)[0][0]
    epoch = [i for step in plan[:12] for micro in step for i in micro]
    assert len(set(epoch)) == len(epoch) == 96


@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_keep_both_limits_and_share_out_evenly(world):
    lengths = [50, 20, 20, 20, 10, 10, 10, 10, 10, 10, 10, 120]
    batches = train_kd.micro_batches_of(range(12), lengths, 5, 60, world)
    assert sorted(i for batch in batches for i in batch) == list(range(12)) and len(batches) % world == 0
    for batch in batches:
        width = max(lengths[i] for i in batch)
        assert 1 <= len(batch) <= 5 and (len(batch) * width <= 60 or batch == [11])


def test_a_token_budget_changes_the_batches_and_no_loss(tiny, data, tmp_path, reference_run, monkeypatch):
    shapes, forward = [], m.SpeechLLM.forward
    monkeypatch.setattr(m.SpeechLLM, "forward", lambda self, *a, **k: (shapes.append(len(k["before"])), forward(self, *a, **k))[1])
    train(*arguments(tiny, data, tmp_path / "run", *FULL, "--batch-size", "8", "--batch-tokens", "200", "--eval-data", data))
    assert_logs_agree(read_log(tmp_path / "run"), read_log(reference_run), 1e-5)
    assert 2 <= len({n for n in shapes if n < 8})


def test_lengths_are_positions_of_the_text_channel_and_three_a_second(tiny, data):
    rows = train_kd.read_manifest(data)
    args = train_kd.get_args(arguments(tiny, data, "nowhere", "--max-answer-tokens", "9"))
    student = m.load_student(str(tiny.student_folder))
    lengths = train_kd.row_lengths(student.tokenizer, rows, args)
    for item, row, length in zip(train_kd.Rows(rows, student, student.tokenizer, args), rows, lengths):
        read = sum(len(item[part]) for part in ("before", "said", "after", "answer"))
        assert abs(length - read - round(3 * row["seconds"])) <= 1  # the end of turn


def test_padding_and_data_wait_are_logged(tiny, data, tmp_path, reference_run, monkeypatch):
    def steps_of(out):
        records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return [r for r in records if r.get("phase") == "distil"]
    packed = steps_of(reference_run)
    assert packed and all(r["padding"] == 0 and 0 <= r["wait"] <= 1 for r in packed)
    monkeypatch.setattr(m, "PACKABLE", set())
    train(*arguments(tiny, data, tmp_path / "run", *FULL, "--global-batch-size", "8", "--eval-data", data))
    assert any(r["padding"] > 0 for r in steps_of(tmp_path / "run"))
    assert_logs_agree(read_log(tmp_path / "run"), read_log(reference_run), 1e-5)


def test_gradients_are_ddps_own_buckets(tiny, data, tmp_path, monkeypatch):
    views, update = [], train_kd.update

    def watched(args, optimizer, *rest):
        views.extend(p.grad._is_view() for group in optimizer.param_groups for p in group["params"])
        return update(args, optimizer, *rest)
    for key in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(key, "0")
    for key, value in dict(WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(train_kd, "update", watched)
    assert train(*arguments(tiny, data, tmp_path / "run", "--max-steps", "2")) == 0
    assert views and all(views)


def test_a_step_hears_first_and_copies_each_weight_once(tiny, data, tmp_path, monkeypatch):
    channels, copies, one_pass = [], [], train_kd.channel_pass

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].shape == (64, 32) and kwargs.get("dtype") == torch.bfloat16:
                copies.append(args[0].data_ptr())
            return func(*args, **kwargs or {})

    def watched(args, model, channel, *rest):
        channels.append(channel)
        with Copies():
            return one_pass(args, model, channel, *rest)
    monkeypatch.setattr(train_kd, "channel_pass", watched)
    train(*arguments(tiny, data, tmp_path / "run", "--dtype", "bfloat16", "--max-steps", "1"))
    assert channels == ["s2t", "t2t"]
    assert len(copies) == 4 and len(set(copies)) == 4  # gate and up of two layers


@pytest.mark.parametrize("processes", [0, 2])
def test_a_cached_teacher_gives_the_same_losses_and_runs_once_a_row(tiny, data, tmp_path, reference_run, monkeypatch, processes):
    options = [*FULL, "--global-batch-size", "8", "--eval-data", data, "--teacher-cache", tmp_path / "cache"]
    if processes:
        options[options.index("--warm-start-batch-size") + 1] = "2"
        process = launch(arguments(tiny, data, tmp_path / "run", *options, "--feature-cache", tmp_path / "f"), processes)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    else:
        train(*arguments(tiny, data, tmp_path / "run", *options))
    assert_logs_agree(read_log(tmp_path / "run"), read_log(reference_run), 1e-5)
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 16
    assert not list((tmp_path / "cache").glob("*/*.[0-9]*"))
    # once more: nothing is computed, and the body is not even asked
    monkeypatch.setattr(train_kd, "save_file", lambda *_: pytest.fail("computed again"))
    train(*arguments(tiny, data, tmp_path / "again", *options))


def test_with_a_cache_the_teacher_s_body_leaves_memory_and_its_head_stays(tiny, data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_kd, "channel_loss", lambda *rest, seen=seen, old=train_kd.channel_loss: (seen.append(rest[5]), old(*rest))[1])
    load = m.load_llm
    teachers = []
    monkeypatch.setattr(m, "load_llm", lambda *a, **k: (teachers.append(load(*a, **k)), teachers[-1])[1])
    train(*arguments(tiny, data, tmp_path / "run", "--max-steps", "1", "--teacher-cache", tmp_path / "cache"))
    teacher = teachers[-1][0]
    assert {p.device.type for p in teacher.base_model.parameters()} == {"meta"}
    assert seen[0].device.type == "cpu" and seen[0].abs().sum() > 0


def test_another_teacher_or_answer_is_not_taken_from_the_cache(tiny, data, tmp_path):
    teacher, tokenizer = m.load_llm(tiny.llm)
    args = train_kd.get_args(arguments(tiny, data, "nowhere", "--teacher-cache", str(tmp_path)))
    student = m.load_student(str(tiny.student_folder))
    items = list(train_kd.Rows(train_kd.read_manifest(data), student, tokenizer, args))[:2]
    path_of = train_kd.teacher_cache(args, teacher, items, 0, 1)
    assert path_of(items[0]).exists() and path_of(items[0]) != path_of({**items[0], "answer": items[0]["answer"][:-1]})
    with torch.no_grad():
        teacher.base_model.layers[0].mlp.up_proj.weight.mul_(1.01)  # as a merged LoRA: no norm changes
    assert train_kd.teacher_cache(args, teacher, [], 0, 1)(items[0]) != path_of(items[0])


def test_controls_of_evaluate_hear_nothing_or_something_else(tiny, data, tmp_path):
    student, (teacher, tokenizer) = m.load_student(str(tiny.student_folder)), m.load_llm(str(tiny.llm))
    rows = train_kd.read_manifest(data)
    dataset = train_kd.Rows(rows, student, tokenizer, train_kd.get_args(arguments(tiny, data, tmp_path)))
    results = train_kd.evaluate(student, teacher, dataset, range(8), ["t2t", "s2t", "silent", "other"], batch_size=3)
    kl, tokens = (results["t2t"][:, i] for i in (0, 2))
    assert kl.abs().max() < 1e-4 and (tokens == torch.tensor([len(dataset[i]["answer"]) for i in range(8)])).all()
    assert not torch.equal(results["s2t"], results["other"]) and not torch.equal(results["s2t"], results["silent"])
    whole = train_kd.evaluate(student, teacher, dataset, range(8), ["s2t"], batch_size=8)["s2t"]
    assert torch.allclose(whole, results["s2t"], atol=1e-4)


def test_the_feature_cache_is_optional_and_changes_nothing_but_rounding(tiny, data, tmp_path):
    for name, cache in (("cached", tmp_path / "features"), ("off", "off")):
        train(*arguments(tiny, data, tmp_path / name, "--max-steps", "2", "--feature-cache", cache))
    assert list((tmp_path / "features").rglob("*.safetensors")) and not (tmp_path / "off/off").exists()
    assert not Path("off").exists()
    assert_logs_agree(read_log(tmp_path / "cached"), read_log(tmp_path / "off"), 1e-2)


def test_what_a_worker_sends_comes_back_as_it_was_in_one_tensor_of_each_type():
    def items():
        return [{"id": str(n), "answer": [1, 2], "features": torch.full((n, 3), float(n)).half(),
                 "clip": {"ids": torch.arange(n + 1), "mel": torch.randn(2, n, generator=torch.manual_seed(n))}} for n in range(3)]

    packed, flat = train_kd.pack(items())
    assert {dtype: x.shape for dtype, x in flat.items()} == {torch.half: (9,), torch.int64: (6,), torch.float32: (6,)}
    for found, expected in zip(train_kd.unpack((packed, flat)), items()):
        assert found.keys() == expected.keys() and (found["id"], found["answer"]) == (expected["id"], [1, 2])
        assert torch.equal(found["features"], expected["features"]) and found["features"].dtype == torch.half
        assert all(torch.equal(found["clip"][k], expected["clip"][k]) for k in ("ids", "mel"))


@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--dtype", "float16"]])
def test_half_precision_trains_and_what_trains_stays_float32(tiny, data, tmp_path, options):
    evaluation = ["--max-steps", "2", "--eval-data", data, "--eval-every", "1"]
    assert train(*arguments(tiny, data, tmp_path / "run", *evaluation, *options)) == 0
    weights = torch.load(checkpoints(tmp_path)[-1], weights_only=True)["model"]
    assert weights and all(v.dtype == torch.float32 for v in weights.values())
    train(*arguments(tiny, data, tmp_path / "exact", *evaluation))
    half, exact = ([r["eval_kl_t2t"] for r in read_log(tmp_path / out) if "eval_kl_t2t" in r] for out in ("run", "exact"))
    assert half == pytest.approx(exact, rel=0.1, abs=1e-3)


@pytest.mark.parametrize("vocab", [600, 49_152, 151_936, 262_144])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 2**27), (torch.bfloat16, 2**28)])
def test_logits_of_a_chunk_stay_within_128_mib_on_a_cpu_or_twice_that(vocab, dtype, most):
    size = 4 * vocab * train_kd.chunk_rows_of(torch.empty(vocab, 1, dtype=dtype))
    assert most / 2 <= size <= most


def test_gradient_checkpointing_changes_no_number(tiny, data, tmp_path):
    for name, options in (("plain", []), ("checkpointed", ["--gradient-checkpointing"])):
        train(*arguments(tiny, data, tmp_path / name, "--max-steps", "2", *options))
    # float32: without checkpointing, norms and gates have formulas of their own for the gradient
    assert_logs_agree(read_log(tmp_path / "plain"), read_log(tmp_path / "checkpointed"), 2e-5)


@pytest.mark.parametrize("content, message", [
    ("not json\n", r":1: not JSON"),
    ('{"id": 1, "prompt": "a"}\n', r":1: no response"),
    ('{"id": 1, "prompt": "a", "response": "b", "audio": "../x.wav"}\n', r"\.\./x.wav' not found"),
    ('{"id": 1, "prompt": "a", "response": "b", "audio": "none.wav"}\n', r"none.wav' not found"),
    ('{"id": 1, "prompt": null, "response": "b", "audio": null}\n', r":1: neither prompt nor audio"),
    ('{"id": 1, "prompt": "a", "response": "b", "audio": null}\n', r"1 rows to distil.*fewer than one"),
])
def test_a_bad_manifest_gets_one_line_that_names_the_place(tiny, tmp_path, content, message):
    manifest = tmp_path / "train.jsonl"
    manifest.write_text(content)
    with pytest.raises(ValueError, match=message):
        train(*arguments(tiny, manifest, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_global_batch_size_must_divide(tiny, data, tmp_path):
    with pytest.raises(ValueError, match="10 is not a multiple of --batch-size 4 x 1 processes; use 8"):
        train(*arguments(tiny, data, tmp_path / "run", "--global-batch-size", "10"))


def test_models_with_different_vocabularies_are_refused_with_an_example(tiny, data, tmp_path):
    student = m.load_student(str(tiny.student_folder))
    teacher, tokenizer = m.load_llm(str(tiny.llm))
    train_kd.check_pair(teacher, tokenizer, student)
    spec = json.loads((Path(tiny.llm) / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    a, b = [t for t in vocab if len(t) > 1 and "<" not in t][-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(spec))
    with pytest.raises(RuntimeError, match=re.escape(f"differ, e.g. in {min(a, b)!r}")):
        train_kd.check_pair(teacher, tokenizer, student)
    teacher.config.final_logit_softcapping = 30.0
    with pytest.raises(RuntimeError, match="final_logit_softcapping"):
        train_kd.check_pair(teacher, m.load_llm(str(tiny.llm))[1], student)


@pytest.mark.parametrize("script", ["train_kd.py", "synth_speech.py", "tools/compare.py", "tools/ask.py", "tools/offline_models.py"])
def test_every_script_answers_help(script):
    result = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "--" in result.stdout


def test_errors_of_a_script_are_one_line_and_exit_code_2(tmp_path):
    for script, argv in (("train_kd.py", ["--data", tmp_path / "none.jsonl"]), ("synth_speech.py", ["--input", tmp_path / "none.jsonl"])):
        result = subprocess.run([sys.executable, str(ROOT / script), *map(str, argv), "--out", str(tmp_path / "out")], capture_output=True, text=True)
        assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1 and "none.jsonl" in result.stderr
        assert not (tmp_path / "out").exists()


def test_tensorboard_gets_every_number_of_the_log(tiny, data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(*arguments(tiny, data, tmp_path / "run", "--max-steps", "2", "--eval-data", data, "--tensorboard"))
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for record in read_log(tmp_path / "run"):
        for key in ("loss", "kd_s2t", "eval_kl8_s2t"):
            if key in record:
                assert any(e.step == record["step"] and math.isclose(e.value, record[key], rel_tol=1e-6)
                           for e in events.Scalars(key)), (key, record["step"])


def test_tensorboard_without_its_package_is_refused_before_any_step(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RuntimeError, match="pip install tensorboard"):
        train(*arguments(tiny, data, tmp_path / "run", "--max-steps", "1", "--tensorboard"))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_equals_eager(tiny, data, tmp_path):
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        train(*arguments(tiny, data, tmp_path / name, "--max-steps", "2", "--channels", "t2t", "--global-batch-size", "4", *flags))
    assert_logs_agree(read_log(tmp_path / "eager"), read_log(tmp_path / "compiled"), 1e-4)


def test_compile_without_a_compiler_says_so_and_runs(tiny, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    train(*arguments(tiny, data, tmp_path / "run", "--max-steps", "1", "--compile"))
    assert "no C++ compiler (g++) found, running eagerly" in capsys.readouterr().out
