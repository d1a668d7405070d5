"""tools/memory_plan.py against what real runs of small models hold."""
import sys
from pathlib import Path

import pytest
import torch

import model as m
import train_kd
from test_train import arguments, data, one_thread, train  # noqa: F401

sys.path.insert(0, str(Path(train_kd.__file__).parent / "tools"))
import memory_plan  # noqa: E402


def size(tensors):
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@pytest.mark.parametrize("train_parts, options, dtype", [
    (["adapter", "llm"], {}, "float32"), (["adapter", "llm"], {}, "bfloat16"), (["adapter"], {}, "bfloat16"),
    (["encoder", "adapter", "llm"], {}, "bfloat16"), (["adapter", "llm"], {"lora_rank": 4}, "bfloat16"),
    (["adapter", "llm"], {"lora_rank": 4, "share_teacher": False}, "bfloat16")])
def test_weights_gradients_and_optimizer_are_those_of_a_run_to_the_byte(tiny, data, tmp_path, monkeypatch, train_parts, options, dtype):
    held, check, clip, save = {}, train_kd.check_pair, torch.nn.utils.clip_grad_norm_, train_kd.save_checkpoint

    def at_check(teacher, tokenizer, student):
        held["teacher weights"] = 0 if teacher is student else size(teacher.parameters())
        check(teacher, tokenizer, student)

    def at_clip(parameters, norm):
        held["gradients"] = size(p.grad for p in parameters)
        return clip(parameters, norm)

    def at_save(path, student, optimizer, *rest):
        held["student weights"] = size(student.parameters())
        held["optimizer"] = size(t for state in optimizer.state.values() for t in state.values())
        save(path, student, optimizer, *rest)

    monkeypatch.setattr(train_kd, "check_pair", at_check)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", at_clip)
    monkeypatch.setattr(train_kd, "save_checkpoint", at_save)
    flags = [f for key, value in options.items() for f in (["--lora-rank", value] if key == "lora_rank" else ["--no-share-teacher"])]
    train(*arguments(tiny, data, tmp_path / "run", "--student", tiny.student, "--max-steps", "1", "--dtype", dtype,
                     "--train", *train_parts, *flags))
    table = memory_plan.plan(tiny.student, tiny.llm, world=1, train=train_parts, dtype=dtype, **options)
    assert {key: table[key] for key in held} == held and len(held) == 4


@pytest.mark.parametrize("models, dtype", [("tiny", "float32"), ("tiny", "bfloat16"), ("real", "bfloat16")])
def test_activations_are_those_that_autograd_keeps(models, request, dtype, monkeypatch):
    monkeypatch.setattr(m, "suit_attention", lambda llm: None)  # the plan knows no packing, and a GPU's attention
    names, half = request.getfixturevalue(models), dtype == "bfloat16"
    student = m.build_student(names.student).train()
    m.keep_little(student.llm)
    inputs = dict(before=[[5] * 40] * 3, after=[[6] * 4] * 3, answers=[[7] * 20] * 3)
    own = {p.untyped_storage()._cdata for p in student.parameters()}
    measured = memory_plan.count_saved(lambda: student(**inputs)[0], own, half)
    measured += half * 2 * sum(layer.mlp.down_proj.weight.numel() for layer in m.layers_of(student.llm))  # unseen here
    table = memory_plan.plan(names.student, names.llm, world=1, batch=3, prompt_tokens=44, answer_tokens=20, seconds=0, dtype=dtype)
    assert table["activations"] + table["autocast's copies of weights"] == pytest.approx(measured, rel=0.15)
    assert (table["autocast's copies of weights"] > 0) == half


def test_checkpointing_keeps_the_layers_inputs_and_one_layer(real):
    options = dict(world=1, batch=4, dtype="float32")
    whole, checkpointed = (memory_plan.plan(real.student, real.llm, checkpointing=c, **options)["activations"] for c in (False, True))
    assert checkpointed < whole / 5  # 30 layers, whose norms and gates keep little anyway


@pytest.mark.parametrize("name, published", [
    ("Qwen2.5-0.5B", 494_032_768), ("Qwen2.5-1.5B", 1_543_714_304), ("Qwen2.5-3B", 3_085_938_688),
    ("Qwen2.5-7B", 7_615_616_512), ("Qwen2.5-14B", 14_770_033_664), ("Qwen2.5-32B", 32_763_876_352)])
def test_the_named_sizes_have_the_published_numbers_of_weights(name, published):
    parts, _ = memory_plan.student_parts("Omni+" + name)
    assert sum(p.numel() for p in parts["llm"].parameters()) == published


def test_sharding_divides_what_ddp_repeats_and_lora_shrinks_what_trains():
    ddp, shard, lora = (memory_plan.plan("Omni+Qwen2.5-0.5B", "Qwen2.5-0.5B", world=8, **more)
                        for more in ({}, {"shard": True}, {"lora_rank": 16}))
    for key in ("student weights", "gradients", "optimizer"):
        assert shard[key] == pytest.approx(ddp[key] / 8, rel=0.02)
    assert lora["teacher weights"] == 0 and lora["optimizer"] < ddp["optimizer"] / 20


def test_the_command_prints_a_table_that_adds_up(capsys):
    memory_plan.main(["--student", "Omni+Qwen2.5-0.5B", "--teacher", "Qwen2.5-0.5B", "--shard"])
    rows = [line.split("|")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    sizes = [float(row) for row in rows]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.05)
