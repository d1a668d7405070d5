"""train_kd.py on tiny random models: what must be equal is equal, what must stop stops, what is stopped goes on.

Runs of two processes: test_shard.py; kills and full disks: test_faults.py.
"""
import argparse
import copy
import functools
import importlib
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, sound

import losses
import model as m
import train_kd

VOLATILE = ("tokens_per_s", "seconds", "hours", "memory")


def arguments(tiny, data, out, *more):
    return ["--teacher", str(tiny.llm), "--student", str(tiny.student_folder), "--data", *(map(str, data) if isinstance(data, tuple) else [str(data)]),
            "--out", str(out), "--dtype", "float32", "--batch-size", "4", "--lr-warmup-steps", "2", "--device", "cpu", *more]


def train(*argv):
    return train_kd.main(train_kd.get_args([str(a) for a in argv]))


def read_log(out):
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in VOLATILE} for record in records]


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def newest(out):
    return torch.load(max(Path(out).glob("ckpt-*.pt")), weights_only=True)


def assert_logs_agree(a, b, tolerance):
    assert [sorted(x) for x in a] == [sorted(x) for x in b] and len(a) > 0
    for x, y in zip(a, b):
        for key in x:
            if isinstance(x[key], float):
                assert math.isclose(x[key], y[key], rel_tol=tolerance, abs_tol=tolerance), (key, x, y)


def assert_same_weights(a, b):
    a, b = (m.load_student(str(Path(out) / "last")).state_dict() for out in (a, b))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are launched: sums over another number of threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    """16 questions with speech."""
    return tiny.manifest(tmp_path_factory.mktemp("manifest"), 16)


@pytest.fixture(scope="module")
def both(tiny, data, tmp_path_factory):
    """The same, and 8 rows without a teacher."""
    return data, tiny.manifest(tmp_path_factory.mktemp("sounds"), 8, seed=1, prompt=None, instruction="Who speaks?",
                               response=lambda i: ("A man.", "A woman, I think.")[i % 2])


FULL = ["--max-steps", "4", "--eval-every", "2", "--global-batch-size", "8", "--sound-batch-size", "2", "--lr-llm", "1e-3", "--save-every", "3"]


@pytest.fixture(scope="module")
def reference_run(tiny, both, tmp_path_factory):
    """One uninterrupted run of all channels, two micro-batches a step."""
    out = tmp_path_factory.mktemp("reference") / "run"
    assert train(*arguments(tiny, both, out, *FULL, "--eval-data", both[0])) == 0
    return out


# ---- a whole run ----

def test_the_log_has_the_documented_keys_and_the_losses_fall(reference_run):
    records = [json.loads(line) for line in (reference_run / "log.jsonl").read_text().splitlines()]
    steps, evals = [r for r in records if "loss" in r], [r for r in records if "eval_kl_s2t" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4] and [r["step"] for r in evals] == [0, 2, 4]
    keys = "loss ce_t2t kd_t2t ce_s2t kd_s2t ce_sound kd_sound norm_adapter norm_llm lr tokens_per_s seconds hours memory"
    assert set(steps[0]) == {"step", *keys.split()} and all(math.isfinite(r[key]) for r in steps for key in keys.split())
    assert all(r["kd_sound"] == 0 for r in steps)
    for r in steps:  # the printed loss is the optimised one
        assert r["loss"] == pytest.approx(sum(r[f"ce_{c}"] + 0.5 * r[f"kd_{c}"] for c in train_kd.CHANNELS), rel=1e-5)
    for key in ("kl", "kl8", "agree", "agree8", "overlap"):
        assert all(f"eval_{key}_{channel}" in r for r in evals for channel in ("t2t", "s2t")), key
    assert all(steps[3][key] < steps[0][key] for key in ("loss", "ce_t2t", "ce_s2t", "ce_sound"))
    assert {p.name for p in reference_run.iterdir()} == {
        "last", "best", "log.jsonl", "args.json", *(p.name for p in reference_run.glob("ckpt-00000[34]-*.pt"))}


def test_before_training_the_text_channel_is_the_teacher_itself(reference_run):
    first = read_log(reference_run)[0]
    assert first["eval_kl_t2t"] == pytest.approx(0, abs=1e-6) and first["eval_agree_t2t"] == 1
    assert first["eval_kl_s2t"] > 1e-4


def test_accumulation_gives_the_losses_of_the_whole_batch(tiny, both, tmp_path, reference_run):
    train(*arguments(tiny, both, tmp_path / "run", *FULL, "--batch-size", "8", "--sound-batch-size", "4", "--eval-data", both[0]))
    assert_logs_agree(read_log(tmp_path / "run"), read_log(reference_run), 1e-5)


def test_stopped_and_resumed_gives_the_same_log_and_weights(tiny, both, tmp_path, reference_run, monkeypatch, capsys):
    argv = arguments(tiny, both, tmp_path / "run", *FULL, "--eval-data", both[0])
    update = train_kd.update

    def terminated(*rest):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(*rest)
    monkeypatch.setattr(train_kd, "update", terminated)
    for step in (1, 2, 3):  # SIGTERM comes within a step, which is finished
        assert train(*argv, *["--resume"] * (step > 1)) == 143
        assert newest(tmp_path / "run")["step"] == step and f"after step {step}; the same command with --resume" in capsys.readouterr().out
    monkeypatch.undo()
    options, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: options.append(k) or load(*a, **k))
    assert train(*argv, "--resume") == 0 and options[0]["mmap"]  # of a 7 B model 91 GB, which 8 processes share
    assert read_log(tmp_path / "run") == read_log(reference_run)
    assert_same_weights(tmp_path / "run", reference_run)


def test_resume_with_other_options_is_refused(tiny, both, reference_run):
    argv = arguments(tiny, both, reference_run, *FULL, "--eval-data", both[0])
    with pytest.raises(ValueError, match="add --resume"):
        train(*argv)
    with pytest.raises(ValueError, match=r"lr_llm 0.001 -> 0.1"):
        train(*argv, "--resume", "--lr-llm", "0.1")


def test_resume_from_a_student_that_was_trained_anew_under_its_name_is_refused(tiny, data, tmp_path):
    """Its checkpoint holds what trained alone: on other frozen weights it would be a student that nobody trained."""
    student = shutil.copytree(tiny.student_folder, tmp_path / "base")
    argv = [*arguments(tiny, data, tmp_path / "run", "--max-steps", "1"), "--student", str(student)]
    train(*argv)
    other = m.load_student(str(student))
    with torch.no_grad():
        other.llm.base_model.layers[0].mlp.up_proj.weight.mul_(1.01)
    m.save_student(other, student)
    with pytest.raises(ValueError, match="changed: weights at the start"):
        train(*argv, "--resume")


def test_resume_after_the_rows_changed_is_refused(tiny, tmp_path):
    path = tiny.manifest(tmp_path, 6)
    argv, rows = arguments(tiny, path, tmp_path / "run", "--max-steps", "1"), read_rows(path)
    train(*argv)
    for changed in (rows + [{**rows[0], "id": "new"}], [{**rows[0], "response": "Another."}, *rows[1:]], rows[1:]):
        write_rows(path, changed)
        with pytest.raises(ValueError, match=r"written by another run; changed: content of the rows '\w+' -> '\w+'; repeat the old ones"):
            train(*argv, "--resume")
    write_rows(path, rows)
    assert train(*argv, "--resume") == 0


def test_a_loss_that_is_not_finite_stops_with_step_and_rows_and_keeps_the_checkpoint(tiny, data, tmp_path, monkeypatch):
    original, calls = losses.fused_ce_kd, []

    def poisoned(**inputs):
        calls.append(1)
        loss, ce, kd = original(**inputs)
        return (loss * float("nan"), ce, kd) if len(calls) > 2 else (loss, ce, kd)  # two channels a step

    monkeypatch.setattr(losses, "fused_ce_kd", poisoned)
    with pytest.raises(RuntimeError, match=r"loss nan in step 2.*train-0\d\d'.*last good state"):
        train(*arguments(tiny, data, tmp_path / "run", "--max-steps", "3", "--save-every", "1"))
    assert newest(tmp_path / "run")["step"] == 1


def test_the_teacher_is_read_once_for_both_channels_and_speech_comes_first(tiny, both, tmp_path, monkeypatch):
    reads, channels, teacher_rows, channel_loss = [], [], train_kd.teacher_rows, train_kd.channel_loss
    monkeypatch.setattr(train_kd, "teacher_rows", lambda *a: reads.append(1) or teacher_rows(*a))
    monkeypatch.setattr(train_kd, "channel_loss", lambda args, channel, *a: channels.append(channel) or channel_loss(args, channel, *a))
    train(*arguments(tiny, both, tmp_path / "run", "--max-steps", "2", "--global-batch-size", "8", "--sound-batch-size", "2"))
    assert len(reads) == 4 and channels == ["sound", "s2t", "t2t"] * 4  # 2 steps x 2 micro-batches


@pytest.mark.parametrize("part", ["adapter", "llm"])
def test_only_what_is_named_trains(tiny, both, tmp_path, part):
    rows = [{**row, "audio": row["audio"] if i < 4 else None} for i, row in enumerate(read_rows(both[0]))]  # steps without speech, too
    path = write_rows(both[0].parent / "little-speech.jsonl", rows)
    train(*arguments(tiny, path, tmp_path / "run", "--max-steps", "4", "--train", part, "--dtype", "bfloat16" if part == "adapter" else "float32"))
    before, after = m.load_student(str(tiny.student_folder)), m.load_student(str(tmp_path / "run/last"))
    changed = {k.split(".")[0] for k, v in before.named_parameters() if not torch.equal(v, after.get_parameter(k))}
    assert {part} == (changed if part == "llm" else changed - {"llm"})  # a frozen LLM is rounded
    assert len({"ce_t2t" in r for r in read_log(tmp_path / "run")}) == 1


def test_tokens_a_second_are_the_answers_tokens_and_no_more(tiny, data, tmp_path):
    train(*arguments(tiny, data, tmp_path / "run", "--max-steps", "1", "--batch-size", "16", "--channels", "s2t"))
    step = json.loads((tmp_path / "run/log.jsonl").read_text())
    tokenizer = m.load_llm(tiny.llm)[1]
    tokens = sum(len(train_kd.answer_ids(tokenizer, row, "response", 256)) for row in read_rows(data))
    assert step["tokens_per_s"] * step["seconds"] == pytest.approx(tokens) and "ce_t2t" not in step


def test_each_part_is_clipped_by_itself_and_its_norm_is_logged():
    parts = {"adapter": torch.nn.Parameter(torch.zeros(4)), "llm": torch.nn.Parameter(torch.zeros(4))}
    optimizer = torch.optim.SGD([{"params": [p], "part": name} for name, p in parts.items()], lr=1.0)
    parts["adapter"].grad, parts["llm"].grad = torch.full((4,), 0.25), torch.full((4,), 50.0)
    args = train_kd.get_args(["--data", "x", "--out", "y"])
    norms = train_kd.update(args, optimizer, "step 1")
    assert norms == pytest.approx({"norm_adapter": 0.5, "norm_llm": 100.0})
    assert torch.allclose(parts["adapter"], torch.full((4,), -0.25)) and torch.allclose(parts["llm"], torch.full((4,), -0.5), atol=1e-4)


# ---- rows without a teacher ----

class Done(Exception):
    pass


@pytest.fixture
def gradient_of(monkeypatch, tiny, tmp_path):
    """Function from options to the gradient of the first step, one vector a part."""
    def gradient_of(*argv):
        def update(args, optimizer, *_):
            raise Done(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]).double())
        monkeypatch.setattr(train_kd, "update", update)
        with pytest.raises(Done) as done:
            train(*arguments(tiny, *argv[:1], tmp_path / "run", "--max-steps", "1", *argv[1:]))
        return done.value.args[0]
    return gradient_of


def test_rows_without_a_teacher_have_a_mean_of_their_own_and_weight_whatever_stands_beside_them(both, gradient_of):
    data, sounds = both
    rows = [{**row, "response": row["response"] * 5} for row in read_rows(data)]
    longer = write_rows(data.parent / "longer.jsonl", rows)  # five times as many tokens of dialogue
    options = "--batch-size", "16", "--sound-batch-size", "8"

    def sound_gradient(dialogue, *more):  # what --sound-weight adds
        one, none = (gradient_of((dialogue, sounds), *options, "--sound-weight", weight, *more) for weight in ("1", "0"))
        assert (one - none).norm() > 0.1
        return one - none

    expected = gradient_of(sounds, *options)  # alone
    assert torch.allclose(sound_gradient(data), expected, atol=1e-5)
    assert torch.allclose(sound_gradient(longer, "--ce-weight", "0"), expected, atol=1e-5)
    assert torch.allclose(gradient_of(sounds, *options, "--ce-weight", "0", "--sound-weight", "3"), 3 * expected, atol=1e-5)


def test_an_untrained_sound_layer_begins_with_what_is_said_about_clips_and_not_with_their_words(tiny):
    student = m.build_student(tiny.student)
    answers = {"Yes.": 1.0, "No.": -1.0}
    rows = [{"prompt": None, "audio": f"{answer}{k}", "instruction": "Loud?", "response": answer} for answer in answers for k in range(20)]
    words = [{"prompt": None, "audio": f"word{k}", "instruction": "What is said?", "response": f"Word {k}."} for k in range(20)]
    noise, direction = torch.manual_seed(0), torch.ones(16)

    def heard_of(row):
        loud = answers.get(row["response"], 0)
        return m.Heard("", torch.arange(0), torch.zeros(0, 16), loud * direction + torch.randn(5, 16, generator=noise),
                       torch.zeros(0, 2))
    assert train_kd.align_sounds(student, words, heard_of) == 0 and not student.adapter.sound.weight.any()
    assert train_kd.align_sounds(student, rows + words, heard_of) == 40 and student.adapter.sound.weight.any()
    table = student.llm.get_input_embeddings().weight
    yes, no = (table[m.text_ids(student.tokenizer, answer)].mean(0) for answer in answers)
    loud, quiet = student.adapter(torch.zeros(0, 16), torch.stack([direction, -direction]))[1]
    assert torch.cosine_similarity(loud - quiet, yes - no, 0) > 0.9


def test_a_sound_begins_as_large_as_what_the_llm_reads(tiny, monkeypatch):
    """Gemma scales inside the module of its embeddings."""
    rows = [{"prompt": None, "audio": f"{k}", "instruction": "Loud?", "response": ("Yes.", "No.")[k % 2]} for k in range(20)]
    sizes = []
    for scale in (1, 8):
        student = m.build_student(tiny.student)
        embed = student.llm.get_input_embeddings()
        embed.register_forward_hook(lambda module, inputs, rows, scale=scale: scale * rows)
        train_kd.align_sounds(student, rows, lambda row: m.Heard("", torch.arange(0), torch.zeros(0, 16), torch.full((5, 16), float(row["response"] == "Yes.")),
                                                                torch.zeros(0, 2)))
        sizes.append(float(student.adapter.sound.weight.norm()))
    assert sizes[1] == pytest.approx(8 * sizes[0], rel=1e-3) and sizes[0] > 0


def test_what_all_answers_to_a_question_share_is_no_part_of_a_sound(tiny):
    student = m.build_student(tiny.student)
    rows = [{"prompt": None, "audio": f"{word}{k}", "instruction": "Who?", "response": f"This is {word}."} for word in ("red", "blue") for k in range(20)]
    noise, sign = torch.manual_seed(0), {"This is red.": 1.0, "This is blue.": -1.0}
    train_kd.align_sounds(student, rows, lambda row: m.Heard("", torch.arange(0), torch.zeros(0, 16),
                                                            sign[row["response"]] + torch.randn(5, 16, generator=noise), torch.zeros(0, 2)))
    red, blue = student.adapter(torch.zeros(0, 16), torch.stack([torch.ones(16), -torch.ones(16)]))[1]
    table, (a, b) = student.llm.get_input_embeddings().weight, [set(m.text_ids(student.tokenizer, text)) for text in sign]
    own = table[list(a - b)].mean(0) - table[list(b - a)].mean(0)
    assert a & b and torch.cosine_similarity(red - blue, own, 0) > 0.9


def test_the_answers_to_a_question_are_averaged_once_however_many_there_are(tiny, monkeypatch):
    """20,000 rows about sounds took 24 GB and minutes where each row averaged them all."""
    student, stacked, stack = m.build_student(tiny.student), [], torch.stack
    rows = [{"prompt": None, "audio": f"{k}", "instruction": "Loud?", "response": ("Yes.", "No.")[k % 2]} for k in range(60)]
    monkeypatch.setattr(torch, "stack", lambda tensors, *rest: (stacked.append(len(tensors)), stack(tensors, *rest))[1])
    train_kd.align_sounds(student, rows, lambda row: m.Heard("", torch.arange(0), torch.zeros(0, 16), torch.ones(5, 16), torch.zeros(0, 2)))
    assert sum(stacked) <= 3 * len(rows)  # the answers, what the clips are to tell, their means


def test_rows_without_a_teacher_count_once_each_however_long(tiny, data, tmp_path):
    args = train_kd.get_args(arguments(tiny, data, tmp_path, "--ce-weight", "0.1"))
    llm = m.load_llm(tiny.llm)[0]
    hidden = torch.randn(9, llm.config.hidden_size, generator=torch.manual_seed(0))
    items = [{"answer": [5, 6, 7, 8, 9, 10, 11]}, {"answer": [3, 4]}]
    loss = train_kd.channel_loss(args, "sound", (llm, None), hidden, items)[0]
    rows = torch.nn.functional.cross_entropy(hidden @ llm.lm_head.weight.T, torch.tensor([5, 6, 7, 8, 9, 10, 11, 3, 4]), reduction="none")
    assert loss.item() == pytest.approx((rows[:7].mean() + rows[7:].mean()).item(), rel=1e-5)


# ---- answers of the student's own ----

@pytest.fixture(scope="module")
def own(data):
    """The questions, answered by the student itself."""
    return write_rows(data.parent / "own.jsonl", [{**row, "source": "student"} for row in read_rows(data)])


@pytest.fixture(scope="module")
def stranger(tiny, tmp_path_factory):
    """Another random LLM with the same tokenizer."""
    from transformers import AutoModelForCausalLM
    folder = shutil.copytree(tiny.llm, tmp_path_factory.mktemp("stranger") / "llm")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(m.load_llm(tiny.llm)[0].config).save_pretrained(folder)
    return folder


def test_own_answers_get_the_divergence_alone_in_both_channels(tiny, data, own, gradient_of, monkeypatch):
    monkeypatch.setattr(train_kd, "OVERLAP", 0)
    assert torch.equal(gradient_of(own), gradient_of(data, "--ce-weight", "0"))
    rows = [{**row, "source": "student" if i % 2 else "sampled"} for i, row in enumerate(read_rows(data))]
    mixed = write_rows(data.parent / "mixed-own.jsonl", rows)
    whole = "--batch-size", "16"
    found, kd = gradient_of(mixed, *whole), gradient_of(data, *whole, "--ce-weight", "0")
    half = write_rows(data.parent / "half.jsonl", rows[::2])
    of_half = gradient_of(half, "--batch-size", "8") - gradient_of(half, "--batch-size", "8", "--ce-weight", "0")
    tokens, tokenizer = [], m.load_llm(tiny.llm)[1]
    for row in rows:
        tokens.append(len(train_kd.answer_ids(tokenizer, row, "response", 256)))
    # CE is a part of the mean over all tokens, as the divergence is
    assert torch.allclose(found, kd + sum(tokens[::2]) / sum(tokens) * of_half, atol=1e-5)


def test_what_is_logged_of_ce_is_the_mean_over_the_tokens_that_have_it(tiny, data, own, tmp_path, monkeypatch):
    monkeypatch.setattr(train_kd, "OVERLAP", 0)
    rows = [{**row, "source": "student" if i % 2 else "sampled"} for i, row in enumerate(read_rows(data))]
    mixed, half = write_rows(data.parent / "mixed-own.jsonl", rows), write_rows(data.parent / "half.jsonl", rows[::2])
    whole = "--batch-size", "16"
    train(*arguments(tiny, mixed, tmp_path / "log", *whole, "--max-steps", "1"))
    train(*arguments(tiny, half, tmp_path / "half", "--batch-size", "8", "--max-steps", "1"))
    train(*arguments(tiny, own, tmp_path / "own", *whole, "--max-steps", "1"))
    log, of_half, of_own = (read_log(tmp_path / name)[0] for name in ("log", "half", "own"))
    for channel in ("t2t", "s2t"):
        assert log[f"ce_{channel}"] == pytest.approx(of_half[f"ce_{channel}"], rel=1e-5)
        assert f"ce_{channel}" not in of_own and of_own[f"kd_{channel}"] == log[f"kd_{channel}"]
    assert of_own["loss"] == pytest.approx(0.5 * (of_own["kd_t2t"] + of_own["kd_s2t"]), rel=1e-5)


@pytest.mark.parametrize("changed, options, message", [
    ({}, ["--labels", "reference"], "expected a prompt, --labels response and --kd-weight above 0"),
    ({}, ["--kd-weight", "0"], "of source student; expected a prompt, --labels response and --kd-weight above 0"),
    ({"prompt": None}, [], "row 'manifest.*/train-000': of source student")])
def test_own_answers_that_no_teacher_can_judge_are_refused(tiny, data, own, tmp_path, changed, options, message):
    path = write_rows(data.parent / "refused.jsonl", [{**row, "reference": "Yes.", **changed} for row in read_rows(own)])
    with pytest.raises(ValueError, match=message):
        train(*arguments(tiny, path, tmp_path / "run", *options))
    assert not list((tmp_path / "run").glob("*"))


def test_own_answers_of_another_kind_than_the_teachers_are_refused_and_on_resume_not_asked_again(tiny, own, stranger, tmp_path, capsys, monkeypatch):
    argv = arguments(tiny, own, tmp_path / "run", "--channels", "t2t", "--max-steps", "2")
    with pytest.raises(ValueError, match=r"rows of source student, e.g. '.*train-000': of .* 64 likeliest tokens 0.[0-4]\d .* expected 0.5 or more; .* answer again"):
        train(*argv, "--teacher", stranger)
    asked, check = [], train_kd.check_own
    monkeypatch.setattr(train_kd, "check_own", lambda *a: asked.append(1) or check(*a))
    update = train_kd.update

    def terminated(*a):
        if not list((tmp_path / "run").glob("ckpt*")):
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*a)
    monkeypatch.setattr(train_kd, "update", terminated)
    assert train(*argv) == 143 and "own answers: of the student's 64 likeliest tokens 1.00 are the teacher's" in capsys.readouterr().out
    assert train(*argv, "--resume") == 0 and asked == [1]


def test_the_first_tokens_of_an_answer_weigh_more(gradient_of, data):
    args = train_kd.get_args(["--data", "x", "--out", "y", "--early-tokens", "4"])
    ce, kd = train_kd.token_weights(args, "s2t", {"answer": [7] * 6, "own": False}).T.tolist()
    assert ce == [1] * 6 and kd == [2, 1.75, 1.5, 1.25, 1, 1]
    args.early_tokens = 0
    assert (train_kd.token_weights(args, "t2t", {"answer": [7] * 6, "own": False}) == 1).all()
    one, more = gradient_of(data), gradient_of(data, "--early-tokens", "4")
    assert not torch.allclose(one, more, rtol=0.01)
    assert torch.equal(gradient_of(data, "--kd-weight", "0"), gradient_of(data, "--kd-weight", "0", "--early-tokens", "4"))


# ---- the teacher alone ----

def test_a_cache_that_teach_only_filled_leaves_nothing_to_compute(tiny, both, tmp_path, monkeypatch, capsys):
    options = [*FULL, "--eval-data", both[0], "--teacher-cache"]
    train(*arguments(tiny, both, tmp_path / "whole", *options, tmp_path / "own"))
    monkeypatch.setattr(m, "load_student", lambda name: pytest.fail("a student loads"))
    assert train(*arguments(tiny, both, tmp_path / "taught", *options, tmp_path / "cache", "--teach-only")) == 0
    monkeypatch.undo()
    said = capsys.readouterr().out
    assert re.search(r"teacher: 16 rows, \d+ tokens of answers, \S+ GiB in .*cache/\w+\n$", said)
    files = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "cache").glob("*/*")}
    assert {name: data for name, (_, data) in files.items()} == {path.name: path.read_bytes() for path in (tmp_path / "own").glob("*/*")}
    moved, to = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **k: moved.append((type(self).__name__, a)) or to(self, *a, **k))
    monkeypatch.setattr(m, "answer_states", (lambda states: lambda llm, rows, *rest: (
        states(llm, rows, *rest) if rows[0].is_floating_point() else pytest.fail("the teacher reads")))(m.answer_states))
    train(*arguments(tiny, both, tmp_path / "run", *options, tmp_path / "cache"))
    assert files == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "cache").glob("*/*")}
    assert not [a for name, a in moved if name == "LlamaForCausalLM"] and ("LlamaModel", ("meta",)) in moved
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


# ---- what Whisper heard, what the teacher gave ----

def test_what_is_heard_is_kept_under_the_digest_of_the_clip(tiny, tmp_path, monkeypatch):
    import soundfile
    path, hear, heard = tiny.manifest(tmp_path, 4), m.Whisper.hear, []
    argv = arguments(tiny, path, tmp_path / "run", "--max-steps", "1")
    monkeypatch.setattr(m.Whisper, "hear", lambda self, clips, *a: heard.extend(clips) or hear(self, clips, *a))
    train(*argv)
    files = set((tmp_path / ".cache").rglob("*.safetensors"))
    assert len(heard) == len(files) == 4
    train(*argv[:-2], "--max-steps", "1", "--out", tmp_path / "again")
    assert len(heard) == 4  # nothing is heard a second time
    clip = tmp_path / read_rows(path)[0]["audio"]
    length = soundfile.info(clip).frames
    soundfile.write(clip, sound(length / 16_000, 99).numpy()[:length], 16_000)
    train(*argv, "--out", tmp_path / "changed")
    assert len(set((tmp_path / ".cache").rglob("*.safetensors")) - files) == 1  # the same name, the same length
    rows = read_rows(path)
    write_rows(path, [{**rows[0], "language": None}, *rows[1:]])
    train(*argv, "--out", tmp_path / "not-told")
    assert len(set((tmp_path / ".cache").rglob("*.safetensors")) - files) == 2


def test_two_rows_of_one_id_to_train_and_to_measure_on_hear_their_own_clips(tiny, data, tmp_path):
    args = train_kd.get_args(arguments(tiny, data, tmp_path / "run", "--cache", str(tmp_path)))
    a, b = train_kd.read_manifest(data)[:2]
    b["id"] = a["id"]
    student = m.load_student(tiny.student_folder)
    heard_of = train_kd.hear_all(args, student, [a, b])
    for row in (a, b):
        assert torch.equal(heard_of(row).ids, student.hear([m.load_audio(row["audio"])])[0].ids)
        assert len(heard_of(row).sound) == round(2 * row["seconds"])


def test_a_cached_teacher_gives_the_same_losses_and_runs_once_a_row(tiny, both, tmp_path, reference_run, monkeypatch):
    options = [*FULL, "--eval-data", both[0], "--teacher-cache", str(tmp_path / "cache")]
    seen, teachers, load, loss = [], [], m.load_llm, train_kd.channel_loss
    monkeypatch.setattr(m, "load_llm", lambda *a: teachers.append(load(*a)) or teachers[-1])
    monkeypatch.setattr(train_kd, "channel_loss", lambda args, channel, llms, *rest: seen.append(llms[-1]) or loss(args, channel, llms, *rest))
    train(*arguments(tiny, both, tmp_path / "run", *options))
    assert_logs_agree(read_log(tmp_path / "run"), read_log(reference_run), 1e-5)
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == len(list((tmp_path / "cache").glob("*/*"))) == 16
    # its body leaves memory, its head stays
    assert seen[-1] is teachers[-1][0] and {p.device.type for p in seen[-1].base_model.layers.parameters()} == {"meta"}
    # once more: nothing is computed
    monkeypatch.setattr(train_kd, "save_file", lambda *_: pytest.fail("computed again"))
    train(*arguments(tiny, both, tmp_path / "again", *options))


def test_another_teacher_or_answer_is_not_taken_from_the_cache(tiny, data, tmp_path):
    teacher, tokenizer = m.load_llm(tiny.llm)
    args = train_kd.get_args(arguments(tiny, data, tmp_path / "run", "--teacher-cache", str(tmp_path)))
    rows, student = train_kd.read_manifest(data)[:2], m.load_student(tiny.student_folder)
    student.prompt = lambda *_: pytest.fail("a speech LLM of transformers would read every clip")
    item_of = functools.partial(train_kd.make_item, args=args, student=student, teacher_tokenizer=tokenizer, heard_of=student.prompt)

    def files():
        train_kd.teach_all(args, copy.deepcopy(teacher), item_of, rows, print)  # its body leaves memory
        return len(list(tmp_path.glob("*/*.safetensors")))
    assert files() == files() == 2
    rows[0]["response"] += "!"
    assert files() == 3
    with torch.no_grad():
        teacher.base_model.layers[0].mlp.up_proj.weight.mul_(1.01)  # as a merged LoRA: no norm changes
    assert files() == 5


def test_rows_to_measure_on_without_a_label_are_left_out_also_with_a_cached_teacher(tiny, data, tmp_path):
    rows = [{**row, "reference": "Yes."} for row in read_rows(data)]
    path = write_rows(data.parent / "labelled.jsonl", rows)
    held = write_rows(data.parent / "held.jsonl", [{**rows[0], "reference": None}, *rows[1:3]])
    argv = arguments(tiny, path, tmp_path / "run", "--labels", "reference", "--teacher-cache", str(tmp_path), "--max-steps", "1", "--eval-data", str(held))
    assert train(*argv) == 0
    # --eval-every 0: before the first and after the last step
    assert [r["step"] for r in read_log(tmp_path / "run") if "eval_kl8_s2t" in r] == [0, 1]


# ---- evaluation ----

def test_questions_in_which_no_words_are_heard_are_bad_rows(tiny, data, tmp_path, monkeypatch, capsys):
    rows, hear_all = read_rows(data), train_kd.hear_all
    silent = {f"{data.parent.name}/{rows[0]['id']}"}

    def deaf(args, student, rows):
        heard_of = hear_all(args, student, rows)

        def heard(row):
            found = heard_of(row)
            nothing = {key: getattr(found, key)[:0] for key in ("text", "ids", "states", "spans")} if found else {}
            return found._replace(**nothing) if nothing and row["id"] in silent else found
        return heard

    monkeypatch.setattr(train_kd, "hear_all", deaf)
    options = ["--eval-data", data, "--max-steps", 1]
    with pytest.raises(ValueError, match=r"row '.*train-000': no words are heard in .*flac; expected speech; .* \(bad rows: 2; .*--max-bad-rows 2"):
        train(*arguments(tiny, data, tmp_path / "one", *options))
    assert train(*arguments(tiny, data, tmp_path / "two", *options, "--max-bad-rows", 2)) == 0
    assert "; 15 train, 15 are measured" in capsys.readouterr().out  # one to train on, one to measure on


def test_how_many_rows_each_channel_has_is_said_before_any_model_loads(tiny, data, tmp_path, monkeypatch, capsys):
    def no_model(name):
        raise RuntimeError("a model loads")

    monkeypatch.setattr(m, "load_student", no_model)
    few = write_rows(data.parent / "few.jsonl", [row if k < 7 else {**row, "audio": None} for k, row in enumerate(read_rows(data))])
    with pytest.raises(RuntimeError, match="a model loads"):
        train(*arguments(tiny, few, tmp_path / "run", "--eval-data", data))
    said = "rows: 16 by text, 7 by speech, 0 without a teacher, 16 to measure on"
    assert capsys.readouterr().out.strip() == said


def test_with_labels_reference_rows_about_sounds_keep_their_only_answer(tiny, data, tmp_path, capsys):
    labelled = write_rows(data.parent / "references.jsonl", [{**row, "reference": "Yes."} for row in read_rows(data)])
    sounds = tiny.manifest(tmp_path / "sounds", 8, seed=1, prompt=None, instruction="Who speaks?", response="A man.")
    assert train(*arguments(tiny, (labelled, sounds), tmp_path / "run", "--labels", "reference", "--sound-batch-size", 2, "--max-steps", 1)) == 0
    assert "16 by text, 16 by speech, 8 without a teacher" in capsys.readouterr().out


def test_evaluation_is_one_row_at_a_time_whatever_is_measured_together(tiny, data, tmp_path, monkeypatch):
    student, (teacher, tokenizer) = m.load_student(tiny.student_folder), m.load_llm(tiny.llm)
    args = train_kd.get_args(arguments(tiny, data, tmp_path, "--cache", str(data.parent / ".cache")))
    rows = train_kd.read_manifest(data)[:7]
    item_of = functools.partial(train_kd.make_item, args=args, student=student, teacher_tokenizer=tokenizer,
                                heard_of=train_kd.hear_all(args, student, rows))
    records = []
    for together in (16, 3):
        monkeypatch.setattr(train_kd, "EVAL_ROWS", together)
        records.append(train_kd.evaluate(args.channels, student, teacher, rows, item_of, torch.no_grad))
    assert records[0] == pytest.approx(records[1], abs=1e-5)
    found = [train_kd.measure(student, teacher, [item_of(row)], ["s2t"], torch.no_grad)["s2t"][0][0] for row in rows]
    for key, kl in (("kl", found), ("kl8", [row[:8] for row in found])):
        assert records[0][f"eval_{key}_s2t"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)


@pytest.fixture
def short_context(tiny, data, tmp_path):
    """Function from a context to options of models that have it; the tokens of the longest prompt and answer, by text or by speech."""
    args = train_kd.get_args(arguments(tiny, data, tmp_path / "run"))
    student, rows = m.load_student(tiny.student_folder), train_kd.read_manifest(data)
    heard_of = train_kd.hear_all(args, student, rows)
    items = [train_kd.make_item(row, args, student, student.tokenizer, heard_of) for row in rows]
    sizes = [max(m.positions(item[c]) for c in ("t2t", "s2t")) + len(item["answer"]) for item in items]

    def options(context):
        for name in ("llm", "student"):
            folder = shutil.copytree(tiny.llm if name == "llm" else tiny.student_folder, tmp_path / f"{name}{context}")
            config = json.loads((folder / "config.json").read_text())
            config.get("llm", config)["max_position_embeddings"] = context
            (folder / "config.json").write_text(json.dumps(config))
        return ["--teacher", tmp_path / f"llm{context}", "--student", tmp_path / f"student{context}", "--max-steps", "1"]
    return options, max(sizes)


def test_a_row_that_just_fits_the_context_trains_one_token_less_is_refused(tiny, data, tmp_path, short_context):
    options, size = short_context  # of one channel, not the sum of both
    assert train(*arguments(tiny, data, tmp_path / "run", *options(size))) == 0
    with pytest.raises(ValueError, match=f"row '.*train-0..': {size} tokens of prompt, speech and answer, the models have room for {size - 1}"):
        train(*arguments(tiny, data, tmp_path / "other", *options(size - 1)))


def test_a_row_to_measure_on_that_does_not_fit_is_refused_before_training(tiny, data, tmp_path, short_context):
    options, size = short_context
    short = write_rows(data.parent / "short.jsonl", [{**row, "response": "Yes."} for row in read_rows(data)])
    with pytest.raises(ValueError, match="row '.*train-0..': .* tokens of prompt"):
        train(*arguments(tiny, short, tmp_path / "other", *options(size - 1), "--eval-data", data))
    assert not list((tmp_path / "other").glob("*"))


# ---- rows ----

def test_answers_are_tokenised_once_and_a_cut_answer_teaches_no_stopping(tiny):
    tokenizer = m.load_llm(tiny.llm)[1]
    row = {"prompt": "?", "response": "The capital of France is Paris.", "reference": "Paris", "finish": "stop"}
    whole = train_kd.answer_ids(tokenizer, row, "response", 100)
    assert whole[-1] == m.end_token(tokenizer)
    assert train_kd.answer_ids(tokenizer, {**row, "finish": "length"}, "response", 100) == whole[:-1]
    assert train_kd.answer_ids(tokenizer, row, "response", 3) == whole[:3]
    assert tokenizer.decode(train_kd.answer_ids(tokenizer, row, "reference", 100)[:-1]) == "Paris"
    sound = {**row, "prompt": None, "finish": "length"}  # has no reference: its response is learned, whatever --labels is
    assert train_kd.answer_ids(tokenizer, sound, "reference", 100) == whole[:-1]


def test_clips_that_no_channel_uses_are_not_heard(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr(m.Whisper, "hear", lambda *_: pytest.fail("a clip was heard"))
    assert train(*arguments(tiny, data, tmp_path / "run", "--channels", "t2t", "--max-steps", "1")) == 0


def test_a_checkpoint_that_was_written_last_stays_beside_damaged_ones_of_later_steps(tiny, tmp_path):
    for step in (40, 60):
        (tmp_path / f"ckpt-{step:06d}-0123456789abcdef.pt").write_bytes(b"damaged")
        os.utime(tmp_path / f"ckpt-{step:06d}-0123456789abcdef.pt", (step, step))
    student = m.load_student(tiny.student)
    student.requires_grad_(False)
    student.adapter.requires_grad_(True)
    args = argparse.Namespace(out=tmp_path, train=["adapter"])
    train_kd.save_checkpoint(args, student, train_kd.make_optimizer(args, student), 21, None, {})
    assert sorted(int(path.name[5:11]) for path in tmp_path.glob("*.pt")) == [21, 60]


def test_no_student_is_written_when_no_row_is_left(tiny, tmp_path):
    args = train_kd.get_args(["--data", "rows.jsonl", "--out", str(tmp_path), "--max-steps", "3"])
    with pytest.raises(ValueError, match="no row is left to train on"):
        train_kd.plan_steps([], args)


def test_system_and_instruction_reach_teacher_and_student_alike(tiny, data, tmp_path):
    student = m.load_student(tiny.student_folder)
    row = {**train_kd.read_manifest(data)[0], "system": "Answer like a pirate.", "instruction": "Translate:"}
    heard = student.hear([m.load_audio(row["audio"])])[0]
    item = train_kd.make_item(row, train_kd.get_args(arguments(tiny, data, tmp_path)), student, student.tokenizer, lambda row: heard)
    assert item["teacher_ids"] == item["t2t"].before
    spoken = item["s2t"].before + m.text_ids(student.tokenizer, row["prompt"]) + item["s2t"].after
    assert spoken == item["teacher_ids"]
    text = student.tokenizer.decode(item["teacher_ids"])
    assert "pirate" in text and "Translate:" in text


def test_the_plan_needs_nothing_but_its_arguments_and_uses_each_row_once_an_epoch():
    def plan(seed=1, steps=30, batch=4, sounds=17, epochs=2):
        args = train_kd.get_args(["--data", "x", "--out", "y", "--seed", str(seed), "--max-steps", str(steps), "--batch-size", str(batch),
                                  "--sound-batch-size", str(batch // 2), "--global-batch-size", "8", "--epochs", str(epochs)])
        rows = [{"prompt": "What?"}] * 103 + [{"prompt": None}] * sounds
        return train_kd.plan_steps(rows, args)
    assert plan() == plan() != plan(seed=2) and plan()[:20] == plan(steps=20)
    assert [sorted(sum(step, [])) for step in plan()] == [sorted(sum(step, [])) for step in plan(batch=8)]  # accumulation moves no row
    taught = [i for step in plan() for micro in step for i in micro if i < 103]
    assert len(set(taught[:96])) == 96 and {taught.count(i) for i in range(103)} == {2, 3}
    assert all(len(step) == 2 and [sum(i < 103 for i in micro) for micro in step] == [4, 4] and len(micro) == 6 for step in plan() for micro in step)
    assert len(plan(steps=0)) == round(2 * 103 / 8) and len(plan(steps=0, epochs=0.5)) == 6
    assert [len(micro) for micro in plan(sounds=0)[0]] == [4, 4]


def test_a_rare_question_about_the_sound_comes_as_often_as_others():
    args = train_kd.get_args(["--data", "x", "--out", "y", "--max-steps", "5", "--sound-batch-size", "6"])
    rows = [{"prompt": None, "instruction": "Loud?"}] * 90 + [{"prompt": None, "instruction": "Who?"}] * 10
    for step in train_kd.plan_steps(rows, args):
        assert sum(k < 90 for k in step[0]) == sum(k >= 90 for k in step[0]) == 3


@pytest.mark.parametrize("changed, options, message", [
    (dict(audio=None), [], "no row has audio and response, which channel s2t needs; unknown keys: .*; rename one"),
    (dict(prompt=None), ["--eval-data", "DATA"], "--eval-data .*train.jsonl: no row can be measured; that needs prompt, audio and response"),
    (dict(response=None), [], "no row has prompt and response"),
    ({}, ["--batch-size", "5"], "4 rows with a teacher .* a step has 5"),
    ({}, ["--train", "encoder"], "--train encoder: .* trains adapter, llm; its Whisper stays as it is")])
def test_what_cannot_be_trained_on_is_an_error_that_names_it(tiny, tmp_path, changed, options, message):
    path = tiny.manifest(tmp_path, 4, **changed)
    with pytest.raises(ValueError, match=message):
        train(*arguments(tiny, path, tmp_path / "run", *(str(path) if x == "DATA" else x for x in options)))
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize("content, message", [
    ("not json\n", r":1: not JSON"),
    ('{"id": 1, "prompt": "a"}\n', r":1: no response"),
    ('{"id": 1, "prompt": "a", "response": "b", "audio": "../x.wav"}\n', r"\.\./x.wav' not found"),
    ('{"id": 1, "prompt": "a", "response": "b", "audio": "none.wav"}\n', r"none.wav' not found"),
    ('{"id": 1, "prompt": null, "response": "b", "audio": null}\n', r":1: neither prompt nor audio")])
def test_a_bad_manifest_gets_one_line_that_names_the_place(tmp_path, content, message):
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        train_kd.read_manifest(tmp_path / "train.jsonl")


@pytest.mark.parametrize("options, message", [
    (["--channels", "t2t", "--train", "adapter"], "--channels t2t trains nothing without --train llm"),
    (["--lora-rank", "4", "--train", "adapter"], "--lora-rank trains the LLM: add llm to --train"),
    (["--kd-weight", "0", "--ce-weight", "0"], "leave nothing to learn"),
    (["--train", "llm", "llm"], "--train llm llm: one is named twice"),
    (["--shard"], "--shard needs torchrun"),
    (["--teach-only"], "--teach-only fills the folder of --teacher-cache; name it")])
def test_options_that_contradict_each_other_are_refused_before_anything_is_loaded(monkeypatch, capsys, options, message):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        train_kd.get_args(["--data", "x", "--out", "y", *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err


# ---- precision, models ----

def test_half_precision_trains_and_what_trains_stays_float32(tiny, both, tmp_path, reference_run):
    assert train(*arguments(tiny, both, tmp_path / "run", *FULL, "--eval-data", both[0], "--dtype", "bfloat16")) == 0
    weights = newest(tmp_path / "run")["model"]
    assert weights and {v.dtype for k, v in weights.items() if k != "adapter.listens"} == {torch.float32}
    half, exact = ([r["eval_kl_s2t"] for r in read_log(out) if "eval_kl_s2t" in r] for out in (tmp_path / "run", reference_run))
    assert half == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("vocab", [600, 49_152, 262_144])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 2**27), (torch.bfloat16, 2**28)])
def test_logits_of_a_chunk_stay_within_128_mib_on_a_cpu_or_twice_that(vocab, dtype, most):
    size = 4 * vocab * train_kd.chunk_rows_of(torch.empty(vocab, 1, dtype=dtype))
    assert most / 2 <= size <= most


def test_gradient_checkpointing_changes_no_number(tiny, both, tmp_path, reference_run):
    train(*arguments(tiny, both, tmp_path / "run", *FULL, "--eval-data", both[0], "--gradient-checkpointing"))
    assert_logs_agree(read_log(tmp_path / "run"), read_log(reference_run), 1e-6)


def test_models_with_different_vocabularies_are_refused_with_an_example(tiny):
    student = m.load_student(tiny.student_folder)
    teacher, tokenizer = m.load_llm(tiny.llm)
    train_kd.check_pair(teacher, tokenizer, student)
    spec = json.loads((Path(tiny.llm) / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    a, b = [t for t in vocab if len(t) > 1 and "<" not in t][-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(spec))
    with pytest.raises(RuntimeError, match=re.escape(f"differ, e.g. in {min(a, b)!r}")):
        train_kd.check_pair(teacher, tokenizer, student)
    teacher.config.final_logit_softcapping = 30.0
    with pytest.raises(RuntimeError, match="its logits are capped"):
        train_kd.check_pair(teacher, m.load_llm(tiny.llm)[1], student)


# ---- scripts ----

@pytest.mark.parametrize("script", ["train_kd", "synth_speech", "eval_voicebench", "eval_mmau", "tools.compare", "tools.ask", "tools.offline_models", "tools.preview", "tools.sample_prompts", "tools.sound_questions"])
def test_every_script_answers_help(script, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script.removeprefix("tools.")).get_args(["--help"])
    assert not stop.value.code and "--" in capsys.readouterr().out


@pytest.mark.parametrize("script, option", [("train_kd.py", "--data"), ("synth_speech.py", "--input")])
def test_errors_of_a_script_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, script, option):
    monkeypatch.setattr(sys, "argv", [script, option, str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(said.splitlines()) == 1 and said.startswith(script) and "none.jsonl" in said
    assert not (tmp_path / "out").exists()
