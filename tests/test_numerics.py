"""Numerical trouble in train_kd.py: what stops the run stops it before the weights are spoilt, the rest goes on."""
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import losses
import model as m
import train_kd


@pytest.fixture
def run(tiny, tmp_path):
    torch.set_num_threads(1)
    data = tiny.manifest(tmp_path, 8)

    def run(*options, student=tiny.student_folder):
        argv = ["--teacher", tiny.llm, "--student", student, "--data", data, "--out", tmp_path / "out", "--dtype", "float32",
                "--batch-size", "4", "--lr-warmup-steps", "0", "--device", "cpu",
                "--save-every", "1", "--cache", tmp_path / "heard", *options]
        return train_kd.main(train_kd.get_args([str(x) for x in argv]))
    return run


def logged(folder):
    return [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]


def saved(folder):
    return torch.load(max(folder.glob("out/ckpt-*.pt")), weights_only=True)


def spoil_loss(monkeypatch, change, steps):
    """change(loss, hidden rows) in these steps, counted from 1; two channels a step."""
    original, calls = losses.fused_ce_kd, []

    def spoilt(**inputs):
        calls.append(1)
        loss, ce, kd = original(**inputs)
        return (change(loss, inputs["student_hidden"]) if (len(calls) + 1) // 2 in steps else loss), ce, kd
    monkeypatch.setattr(losses, "fused_ce_kd", spoilt)


def no_gradient(loss, hidden):
    """The loss stays finite, its gradient is not."""
    return loss + (hidden * 0).sum().sqrt()


def test_sounds_that_are_not_numbers_stop_the_run_with_the_rows(run, tmp_path):
    assert run("--max-steps", "1") == 0
    shutil.rmtree(tmp_path / "out")
    for path in (tmp_path / "heard").rglob("*.safetensors"):
        heard = load_file(path)
        save_file({**heard, "sound": heard["sound"] * math.nan}, path)
    with pytest.raises(RuntimeError, match=r"loss nan in step 1;.*/train-00\d'.*last good state"):
        run("--max-steps", "2")


def test_logits_that_overflow_stop_the_run_before_the_first_update(run, tiny, tmp_path):
    student = m.load_student(tiny.student_folder)
    student.llm.base_model.norm.weight.data *= 1e38
    m.save_student(student, tmp_path / "loud")
    with pytest.raises(RuntimeError, match=r"loss nan in step 1"):
        run("--max-steps", "2", student=tmp_path / "loud")
    assert not list(tmp_path.glob("out/ckpt-*.pt"))


def test_a_gradient_that_is_not_finite_stops_the_run_and_the_checkpoint_stays_good(run, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, no_gradient, [2])
    with pytest.raises(RuntimeError, match=r"gradient norm nan of adapter in step 2; .*last good state"):
        run("--max-steps", "3")
    assert saved(tmp_path)["step"] == 1 and all(torch.isfinite(x).all() for x in saved(tmp_path)["model"].values())


def test_a_spike_of_the_loss_is_in_the_log_and_moves_the_weights_no_further_than_any_step(run, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, lambda loss, hidden: loss * 1e6, [2])
    assert run("--max-steps", "3", "--lr-llm", "1e-3") == 0
    steps = [r for r in logged(tmp_path) if "loss" in r]
    assert steps[1]["loss"] > 1e5 * steps[0]["loss"] and steps[1]["norm_llm"] > 1e4 and steps[2]["loss"] < 2 * steps[0]["loss"]


def test_answers_of_one_token_are_learned(run, tiny, tmp_path):
    rows = [{**json.loads(line), "response": "Y", "finish": "length"} for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--max-steps", "2") == 0
    tokenizer = m.load_llm(tiny.llm)[1]
    assert [len(train_kd.answer_ids(tokenizer, row, "response", 256)) for row in rows] == [1] * 8
    assert all(0 < r["ce_s2t"] < 100 and r["kd_s2t"] >= 0 for r in logged(tmp_path) if "loss" in r)


def test_rows_without_an_answer_give_no_loss_and_no_step_lacks_a_gradient(run, tmp_path, capsys):
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        row["response"] = None
    for row in rows[2:4]:
        row["audio"] = None
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--max-steps", "1", "--train", "adapter") == 0  # the LLM is frozen: text alone would teach nothing
    assert "rows: 6 by text, 4 by speech" in capsys.readouterr().out
