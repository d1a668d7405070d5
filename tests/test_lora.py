"""LoRA, its shared teacher and its merged folder, end to end on tiny random models."""
import contextlib
import functools
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import test_families as families
import torch
from conftest import QUESTIONS
from test_train import arguments, assert_logs_agree, assert_same_weights, data, newest, one_thread, read_log, train  # noqa: F401

import model as m
import train_kd

LORA = ["--lora-rank", "4", "--lr-llm", "0.05", "--max-steps", "3", "--global-batch-size", "8"]


def lora_run(tiny, data, out, *more):
    assert train(*arguments(tiny, data, out, *LORA, "--student", tiny.student, *more)) == 0
    return Path(out)


@pytest.fixture(scope="module")
def run(tiny, data, tmp_path_factory):
    """Three steps with LoRA, the teacher shared, measured before and after."""
    return lora_run(tiny, data, tmp_path_factory.mktemp("lora") / "run", "--eval-data", data, "--eval-every", "2")


def logits(llm, tokenizer):
    with torch.no_grad():
        return llm(**tokenizer(QUESTIONS[0], return_tensors="pt")).logits


def test_only_lora_and_the_adapter_change_and_the_checkpoint_holds_nothing_else(run):
    saved = newest(run)["model"]
    llm = [k for k in saved if k.startswith("llm.")]
    assert len(llm) == 2 * 2 * 7, [k for k in saved if ".lora_" not in k]
    assert all(".lora_" in k for k in llm)  # A and B of 7 layers of 2 blocks
    assert {k.split(".")[0] for k in saved} - {"whisper"} == {"adapter", "llm"}
    assert all(saved[k].abs().max() > 0 for k in llm if "lora_B" in k)


def test_last_is_a_plain_student_without_lora(tiny, run):
    student, (base, tokenizer) = m.load_student(str(run / "last")), m.load_llm(tiny.llm)
    assert not any("lora" in k or "base_layer" in k for k in student.state_dict()) and not list(run.glob("last/*adapter*"))
    assert student.state_dict().keys() == m.load_student(tiny.student).state_dict().keys()
    assert (logits(student.llm, tokenizer) - logits(base, tokenizer)).abs().max() > 0.01


def test_before_training_lora_is_the_base_and_the_merged_student_measures_as_the_live_one(tiny, data, run):
    before, *_, after = [r for r in read_log(run) if "eval_kl_t2t" in r]
    assert before["eval_kl_t2t"] == 0 and after["eval_kl_t2t"] > 1e-4
    student, (teacher, tokenizer) = m.load_student(str(run / "last")), m.load_llm(tiny.llm)
    args, rows = train_kd.get_args(arguments(tiny, data, run)), train_kd.read_manifest(data)
    item_of = functools.partial(train_kd.make_item, args=args, student=student, teacher_tokenizer=tokenizer,
                                heard_of=train_kd.hear_all(args, student, rows))
    for key, value in train_kd.evaluate(args.channels, student, teacher, rows, item_of, contextlib.nullcontext).items():
        assert value == pytest.approx(after[key], abs=2e-4), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_student_with_its_adapters_off_teaches_as_a_second_copy_would(tiny, data, tmp_path, monkeypatch, dtype):
    load, kept, make = train_kd.load_teacher, [], train_kd.make_optimizer
    monkeypatch.setattr(train_kd, "make_optimizer", lambda *a: kept.append(parameter_bytes()) or make(*a))
    for name in ("shared", "separate"):
        lora_run(tiny, data, tmp_path / name, "--eval-data", data, "--dtype", dtype)
        monkeypatch.setattr(train_kd, "load_teacher", lambda args, student, dtype: (
            m.load_llm(args.teacher, dtype)[0].requires_grad_(False), student.tokenizer))
    assert load is not train_kd.load_teacher
    llm = sum(v.numel() * v.element_size() for v in m.load_llm(tiny.llm, getattr(torch, dtype))[0].parameters())
    assert kept[1] - kept[0] == llm  # bytes of one LLM
    assert_logs_agree(read_log(tmp_path / "shared"), read_log(tmp_path / "separate"), 1e-6)


def parameter_bytes():
    """Of all parameters that are alive."""
    import gc
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) is torch.nn.Parameter]
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in alive}.values())


def test_only_a_teacher_of_equal_weights_is_shared(tiny, data, tmp_path):
    student = m.load_student(tiny.student_folder)

    def shared(*options):
        args = train_kd.get_args([*arguments(tiny, data, tmp_path), *options])
        return train_kd.load_teacher(args, student, torch.float32)[0] is student.llm
    assert shared(*LORA) and not shared() and not shared(*LORA, "--teacher-cache", str(tmp_path))
    student.llm.model.norm.weight.data[0] += 1
    assert not shared(*LORA)


@pytest.mark.parametrize("make", [families.qwen2_audio, families.omni], ids=lambda make: make.__name__)
def test_a_speech_llm_of_transformers_gets_lora_too_and_its_folder_holds_it_merged(tiny, data, tmp_path, make):
    folder = tmp_path / "student"
    folder.mkdir()
    torch.manual_seed(0)
    make(folder).save_pretrained(folder)
    run = lora_run(tiny, data, tmp_path / "run", "--student", str(folder), "--teacher", str(folder), "--max-steps", "2")
    saved = newest(run)["model"]
    assert all(".lora_" in k for k in saved if "language" in k or ".layers." in k and "audio" not in k)
    expected, merged = m.load_student(str(folder)).llm.state_dict(), m.load_student(str(run / "last")).llm.state_dict()
    for key in [k for k in saved if ".lora_A." in k]:
        name = key.replace(".lora_A.default.", ".").partition("layers.")[2]
        [name] = [k for k in expected if k.endswith(f"layers.{name}")]
        expected[name] += 2 * saved[key.replace("lora_A", "lora_B")] @ saved[key]  # alpha / rank
        assert saved[key.replace("lora_A", "lora_B")].abs().max() > 0
    for name, weight in expected.items():
        assert torch.allclose(merged[name], weight, atol=1e-5), name


def test_a_stopped_lora_run_goes_on_to_the_same_log_and_weights(tiny, data, tmp_path, run, monkeypatch):
    options, update = ["--eval-data", data, "--eval-every", "2"], train_kd.update
    monkeypatch.setattr(train_kd, "update", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or update(*a))
    assert train(*arguments(tiny, data, tmp_path / "run", *LORA, "--student", tiny.student, *options)) == 143
    monkeypatch.undo()
    lora_run(tiny, data, tmp_path / "run", *options, "--resume")
    assert read_log(tmp_path / "run") == read_log(run)
    assert_same_weights(tmp_path / "run", run)


def test_gradient_checkpointing_with_lora_changes_no_number(tiny, data, tmp_path, run):
    lora_run(tiny, data, tmp_path / "run", "--eval-data", data, "--eval-every", "2", "--gradient-checkpointing")
    assert_logs_agree(read_log(tmp_path / "run"), read_log(run), 1e-6)


def test_a_frozen_llm_in_half_precision_keeps_the_frequencies_of_its_positions(tiny, data, tmp_path, monkeypatch):
    seen, make = [], train_kd.make_optimizer
    monkeypatch.setattr(train_kd, "make_optimizer", lambda args, student: seen.append(student.llm) or make(args, student))
    train(*arguments(tiny, data, tmp_path / "run", "--train", "adapter", "--dtype", "bfloat16", "--max-steps", "1"))
    plain = m.load_llm(tiny.llm, torch.bfloat16)[0].model.rotary_emb.inv_freq
    assert seen[0].dtype == torch.bfloat16 and torch.equal(seen[0].model.rotary_emb.inv_freq, plain)


def test_lora_without_its_package_is_refused_by_name(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RuntimeError, match="pip install peft"):
        train(*arguments(tiny, data, tmp_path / "run", *LORA))
