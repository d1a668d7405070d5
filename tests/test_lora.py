"""LoRA, its shared teacher, its two forms on disk, and --freeze, end to end on tiny random models."""
import json
import sys
from pathlib import Path

import pytest
import torch

import model as m
import test_families as families
import train_kd
from conftest import QUESTIONS, build_student, hidden_rows, sound
from test_train import arguments, assert_logs_agree, data, one_thread, read_log, train  # noqa: F401

LORA = ["--lora-rank", "4", "--lora-alpha", "8", "--lr-llm", "0.05", "--max-steps", "3", "--global-batch-size", "8"]


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


def test_only_lora_and_the_adapter_change_and_the_checkpoint_holds_nothing_else(tiny, run):
    saved = torch.load(max(run.glob("ckpt-*.pt")), weights_only=True)
    llm = [k for k in saved["model"] if k.startswith("llm.")]
    assert len(llm) == 2 * 2 * 7 and all(".lora_" in k for k in llm)  # A and B of 7 layers of 2 blocks
    assert {k.split(".")[0] for k in saved["model"]} == {"adapter", "llm"}
    assert all(saved["model"][k].abs().max() > 0 for k in llm if "lora_B" in k)


def test_last_is_a_plain_student_and_its_adapter_gives_the_same_logits_on_the_base(tiny, run):
    from peft import PeftModel
    from transformers import AutoModel
    student = AutoModel.from_pretrained(run / "last", trust_remote_code=True)
    assert not any("lora" in k or "base_layer" in k for k in student.state_dict())
    base, tokenizer = m.load_llm(tiny.llm)
    plain, adapter = logits(base, tokenizer), run / "last/adapter"
    assert {p.name for p in adapter.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny.llm
    adapted = logits(PeftModel.from_pretrained(base, adapter), tokenizer)
    assert torch.allclose(adapted, logits(student.llm, tokenizer), atol=1e-5) and (adapted - plain).abs().max() > 0.01
    names = {k for k, _ in m.load_llm(tiny.llm)[0].named_modules()}
    from safetensors import safe_open
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:  # the names that servers look for
        assert all(k.startswith("base_model.model.") and k.endswith((".lora_A.weight", ".lora_B.weight"))
                   and k[len("base_model.model."):-len(".lora_A.weight")] in names for k in file.keys())


def test_before_training_lora_is_the_base_and_the_merged_student_measures_as_the_live_one(tiny, data, run):
    before, *_, after = [r for r in read_log(run) if "eval_kl_t2t" in r]
    assert before["eval_kl_t2t"] == 0 and after["eval_kl_t2t"] > 1e-4
    student, (teacher, tokenizer) = m.load_student(str(run / "last")), m.load_llm(tiny.llm)
    rows = train_kd.Rows(train_kd.read_manifest(data), student, tokenizer, train_kd.get_args(arguments(tiny, data, run)))
    sums = {k: v.sum(0) for k, v in train_kd.evaluate(student, teacher, rows, range(16)).items()}
    for key, value in train_kd.eval_log(sums).items():
        assert value == pytest.approx(after[key], abs=2e-4), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shared_teacher_gives_the_losses_of_a_second_copy(tiny, data, tmp_path, monkeypatch, dtype):
    loads, original, kept = [], m.load_llm, []
    monkeypatch.setattr(m, "load_llm", lambda *a, **k: loads.append(1) or original(*a, **k))
    make = train_kd.make_optimizer
    monkeypatch.setattr(train_kd, "make_optimizer", lambda *a: kept.append(tensor_bytes()) or make(*a))
    options = ("--eval-data", data, "--dtype", dtype)
    for name, more in (("shared", []), ("separate", ["--no-share-teacher"])):
        lora_run(tiny, data, tmp_path / name, *options, *more)
    assert len(loads) == 1 + 2  # the student's LLM; the student's LLM and the teacher
    llm = sum(v.numel() * v.element_size() for v in original(tiny.llm, getattr(torch, dtype))[0].parameters())
    assert kept[1] - kept[0] == llm  # bytes of one LLM
    assert_logs_agree(read_log(tmp_path / "shared"), read_log(tmp_path / "separate"), 1e-6)


def tensor_bytes():
    """Bytes of all parameters that are alive."""
    import gc
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) is torch.nn.Parameter]
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in alive}.values())


def test_the_teacher_is_shared_by_equal_weights_too_and_not_with_others(tiny, data, tmp_path):
    student = m.load_student(str(tiny.student_folder))
    args = train_kd.get_args([*arguments(tiny, data, tmp_path), *LORA])
    assert train_kd.load_teacher(args, student, torch.float32)[0] is student
    args.share_teacher = False
    assert train_kd.load_teacher(args, student, torch.float32)[0] is not student
    args.share_teacher = True
    student.llm.model.norm.weight.data[0] += 1
    assert train_kd.load_teacher(args, student, torch.float32)[0] is not student


def test_lora_at_the_speech_only_leaves_the_text_channel_bit_for_bit_and_survives_saving(tiny, data, tmp_path):
    run = lora_run(tiny, data, tmp_path / "run", "--lora-speech-only")
    assert all(r["ce_t2t"] == 0 < r["ce_s2t"] for r in read_log(run))
    student = m.load_student(str(run / "last"))
    plain = m.load_student(tiny.student)
    plain.adapter.load_state_dict(student.adapter.state_dict())
    text, speech = [{"prompt": QUESTIONS[0]}, {"prompt": QUESTIONS[7]}], [{"audio": sound(2)}, {"audio": sound(1, 3)}]
    answers = ["Paris, of course!", "Yes."]
    for a, b in zip(hidden_rows(student, text, answers), hidden_rows(plain, text, answers)):
        assert torch.equal(a, b)
    for a, b in zip(hidden_rows(student, speech, answers), hidden_rows(plain, speech, answers)):
        assert (a - b).abs().max() > 0.01
    mixed = hidden_rows(student, [text[0], speech[1]], answers)
    assert torch.allclose(mixed[0], hidden_rows(plain, text, answers)[0], atol=1e-5)
    assert torch.allclose(mixed[1], hidden_rows(student, speech, answers)[1], atol=1e-5)
    assert not (run / "last/adapter").exists()


def test_generation_with_lora_at_the_speech_only_is_that_of_whole_forwards(tiny):
    student = build_student(tiny.student, 0.2)
    m.add_lora(student.llm, 4, 8)
    student.config.speech_lora = dict(rank=4, alpha=8)
    torch.manual_seed(1)
    for name, p in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    rows = [{"audio": sound(2.5)}, {"prompt": QUESTIONS[3]}, {"audio": sound(1, 3)}]
    answers = student.generate(rows, max_new_tokens=6)
    assert answers == [student.generate([row], max_new_tokens=6)[0] for row in rows]
    end = m.end_token(student.tokenizer)
    head = student.llm.get_output_embeddings().weight
    for row, answer in zip(rows, answers):
        before, after, waveform = student.prompt(row)
        ids, said = [], dict(clips=[0], mels=[student.mel(waveform)]) if waveform is not None else {}
        while len(ids) < 6 and ids[-1:] != [end]:
            with torch.inference_mode():
                ids.append(int((student([before], [after], [ids + [0]], **said)[0][-1] @ head.T).argmax()))
        assert student.tokenizer.decode(ids, skip_special_tokens=True) == answer


def test_a_student_with_lora_at_the_speech_trains_on_only_with_the_same_options(tiny, data, tmp_path):
    first = lora_run(tiny, data, tmp_path / "first", "--lora-speech-only", "--max-steps", "1")
    more = ["--student", first / "last", "--max-steps", "1"]
    with pytest.raises(ValueError, match="has LoRA at its speech, .*'rank': 4.*ask for None"):
        train(*arguments(tiny, data, tmp_path / "plain", *more))
    assert lora_run(tiny, data, tmp_path / "on", "--lora-speech-only", *map(str, more))
    saved = torch.load(max(tmp_path.glob("on/ckpt-*.pt")), weights_only=True)["model"]
    assert all(v.dtype == torch.float32 for v in saved.values())


@pytest.mark.parametrize("make", [families.qwen2_audio, families.omni], ids=lambda make: make.__name__)
def test_a_speech_llm_of_transformers_gets_lora_too_merged_and_as_an_adapter(tiny, data, tmp_path, make):
    from peft import PeftModel
    folder = tmp_path / "student"
    folder.mkdir()
    torch.manual_seed(0)
    make(folder).save_pretrained(folder)
    run = lora_run(tiny, data, tmp_path / "run", "--student", folder, "--teacher", folder, "--max-steps", "2")
    assert all(".lora_" in k for k in torch.load(max(run.glob("ckpt-*.pt")), weights_only=True)["model"] if k.startswith("llm."))
    base, merged = families.plain(folder), families.plain(run / "last")
    inputs = dict(input_ids=torch.tensor([[5, 6, 7, 8]]), attention_mask=torch.ones(1, 4, dtype=torch.long))
    with torch.no_grad():
        plain, ours = base(**inputs).logits, merged(**inputs).logits
        adapted = PeftModel.from_pretrained(base, run / "last/adapter")(**inputs).logits
    assert torch.allclose(adapted, ours, atol=1e-4) and (ours - plain).abs().max() > 1e-3


def test_a_stopped_lora_run_goes_on_to_the_same_log_and_weights(tiny, data, tmp_path, run, monkeypatch):
    options = ["--eval-data", data, "--eval-every", "2", "--save-every", "1"]
    evaluate = train_kd.evaluate
    calls = []
    monkeypatch.setattr(train_kd, "evaluate", lambda *a, **k: calls.append(1) or (evaluate(*a, **k) if len(calls) < 2 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        lora_run(tiny, data, tmp_path / "run", *options)
    monkeypatch.undo()
    assert torch.load(max(tmp_path.glob("run/ckpt-*.pt")), weights_only=True)["step"] == 2  # one precedes each evaluation
    lora_run(tiny, data, tmp_path / "run", *options, "--resume")
    assert_logs_agree(read_log(tmp_path / "run"), read_log(run), 1e-7)
    a, b = (m.load_student(str(out / "last")).state_dict() for out in (tmp_path / "run", run))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_gradient_checkpointing_with_lora_changes_no_number(tiny, data, tmp_path):
    for name, options in (("plain", []), ("checkpointed", ["--gradient-checkpointing"])):
        lora_run(tiny, data, tmp_path / name, *options)
    # float32: without checkpointing, norms and gates have formulas of their own for the gradient
    assert_logs_agree(read_log(tmp_path / "plain"), read_log(tmp_path / "checkpointed"), 2e-5)


def test_a_frozen_llm_in_half_precision_keeps_the_frequencies_of_its_positions(tiny, data, tmp_path, monkeypatch):
    seen, make = [], train_kd.make_optimizer
    monkeypatch.setattr(train_kd, "make_optimizer", lambda args, student: seen.append(student.llm) or make(args, student))
    train(*arguments(tiny, data, tmp_path / "run", "--train", "adapter", "--dtype", "bfloat16", "--max-steps", "1"))
    plain = m.load_llm(tiny.llm, torch.bfloat16)[0].model.rotary_emb.inv_freq
    assert seen[0].dtype == torch.bfloat16 and torch.equal(seen[0].model.rotary_emb.inv_freq, plain)


def test_freeze_keeps_what_it_finds_and_says_how_much(tiny, data, tmp_path, capsys):
    before = m.load_student(str(tiny.student_folder)).state_dict()
    train(*arguments(tiny, data, tmp_path / "run", "--max-steps", "2", "--freeze", r"layers\.0\.|adapter\.spell"))
    assert "--freeze keeps 11 parameters as they are" in capsys.readouterr().out
    after = m.load_student(str(tmp_path / "run/last")).state_dict()
    same = {k for k in before if torch.equal(before[k], after[k]) and not k.startswith("encoder.")}
    assert same == {k for k in before if k.startswith(("llm.model.layers.0.", "adapter.spell."))}


@pytest.mark.parametrize("expression, message", [("no such name", "finds 0 of"), (".", "finds (..) of the \\1 ")])
def test_freeze_that_finds_nothing_or_everything_is_an_error(tiny, data, tmp_path, expression, message):
    with pytest.raises(ValueError, match=message):
        train(*arguments(tiny, data, tmp_path / "run", "--freeze", expression))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [
    ["--lora-rank", "4", "--train", "adapter"], ["--lora-speech-only"], ["--freeze", "("],
    ["--lora-rank", "4", "--lora-speech-only", "--channels", "t2t"]])
def test_options_that_contradict_each_other_are_refused(tiny, data, tmp_path, options, capsys):
    with pytest.raises(SystemExit) as stop:
        train_kd.get_args(arguments(tiny, data, tmp_path, *options))
    assert stop.value.code == 2 and options[0][2:6] in capsys.readouterr().err


def test_lora_without_its_package_is_refused_by_name(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RuntimeError, match="pip install peft"):
        train(*arguments(tiny, data, tmp_path / "run", *LORA))
