"""
Speech LLMs of transformers as students: tiny random checkpoints made by their real classes, then used as any folder is.

  python -m pytest -q tests/test_families.py                  <- CPU, no download, a minute on one core
"""
import contextlib
import copy
import functools
import json
import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from conftest import SYSTEM, hidden_rows, save_tokenizer, sound
from safetensors.torch import load_file
from torch.testing import assert_close

import model as m
import train_kd

CLOSE = dict(rtol=1e-4, atol=1e-4)
LISTS = "".join((  # content is a string or a list of blocks; AUDIO stands for what a sound becomes
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n", SYSTEM,
    "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}",
    "{% else %}{% for block in message['content'] %}{% if block['type'] == 'audio' %}AUDIO{% else %}{{ block['text'] }}{% endif %}",
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"))
STRINGS = "".join((
    "{% for message in messages %}{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"))
OMNI_TOKENS = dict(image_token="<|IMAGE|>", audio_token="<|AUDIO|>", video_token="<|VIDEO|>",
                   vision_bos_token="<|vision_bos|>", vision_eos_token="<|vision_eos|>",
                   audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>")
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            initializer_range=0.2, tie_word_embeddings=False, max_position_embeddings=4096)
HEARS = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=128, initializer_range=0.2)


def text_config(tokenizer, **more):
    return dict(TEXT, vocab_size=len(tokenizer) + 9, bos_token_id=tokenizer.bos_token_id,  # as padded heads are
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **more)


def tokens(folder, names, template, special=()):
    """The tests' tokenizer with a family's special tokens and template."""
    special = [*names.values(), *special]
    base = save_tokenizer(folder)
    base.add_special_tokens({"additional_special_tokens": special})
    return t.PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=template, extra_special_tokens=names)


def qwen2_audio(folder):
    template = LISTS.replace("AUDIO", "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n")
    tokenizer = tokens(folder, {}, template, ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"])
    t.Qwen2AudioProcessor(t.WhisperFeatureExtractor(feature_size=128), tokenizer, chat_template=template).save_pretrained(folder)
    return t.Qwen2AudioForConditionalGeneration(t.Qwen2AudioConfig(
        audio_config=dict(HEARS, model_type="qwen2_audio_encoder"), text_config=dict(text_config(tokenizer), model_type="qwen2"),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>")))


def omni_thinker_config(folder):
    template = LISTS.replace("AUDIO", "<|audio_bos|><|AUDIO|><|audio_eos|>")
    tokenizer = tokens(folder, OMNI_TOKENS, template)
    tokenizer.save_pretrained(folder)
    t.WhisperFeatureExtractor(feature_size=128, chunk_length=300).save_pretrained(folder)
    ids = {f"{k}_id": tokenizer.convert_tokens_to_ids(v) for k, v in OMNI_TOKENS.items() if k.endswith("token")}
    return dict(
        audio_config=dict(HEARS, output_dim=32, n_window=100),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[0]),
        text_config=dict(text_config(tokenizer), rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])),
        audio_token_id=ids["audio_token_id"], image_token_id=ids["image_token_id"], video_token_id=ids["video_token_id"],
        vision_start_token_id=ids["vision_bos_token_id"], vision_end_token_id=ids["vision_eos_token_id"],
        audio_start_token_id=ids["audio_bos_token_id"], audio_end_token_id=ids["audio_eos_token_id"],
        initializer_range=0.2)


def omni_thinker(folder):
    return t.Qwen2_5OmniThinkerForConditionalGeneration(t.Qwen2_5OmniThinkerConfig(**omni_thinker_config(folder)))


def omni(folder):
    """Thinker and talker, as the published checkpoint."""
    torch.save({"Chelsie": {"bos_token": 3}}, folder / "spk_dict.pt")
    thinker = omni_thinker_config(folder)
    talker = dict(thinker["text_config"], embedding_size=32, head_dim=8, vocab_size=40, num_hidden_layers=1)
    return t.Qwen2_5OmniForConditionalGeneration(t.Qwen2_5OmniConfig(
        thinker_config=thinker, talker_config=talker,
        token2wav_config=dict(
            dit_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ff_mult=1, emb_dim=8, head_dim=8, block_size=4,
                            mel_dim=8, enc_dim=8, enc_emb_dim=8, enc_channels=[16, 16, 16, 16, 16], enc_attention_channels=8,
                            enc_res2net_scale=2, enc_se_channels=8, num_embeds=16),
            bigvgan_config=dict(mel_dim=8, upsample_initial_channel=16, upsample_rates=[2], upsample_kernel_sizes=[4],
                                resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 1, 1]]))))


def voxtral(folder):
    template = ("{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]{% if message['content'] is string %}"
                "{{ message['content'] }}{% else %}{% for block in message['content'] %}{% if block['type'] == 'audio' %}"
                "[BEGIN_AUDIO][AUDIO]{% else %}{{ block['text'] }}{% endif %}{% endfor %}{% endif %}[/INST]{% elif message['role'] == "
                "'system' %}[SYSTEM_PROMPT]{{ message['content'] }}[/SYSTEM_PROMPT]{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}")
    tokenizer = tokens(folder, {}, template, ["[INST]", "[/INST]", "[BEGIN_AUDIO]", "[AUDIO]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"])
    tokenizer.save_pretrained(folder)
    t.WhisperFeatureExtractor(feature_size=128).save_pretrained(folder)
    return t.VoxtralForConditionalGeneration(t.VoxtralConfig(
        audio_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, head_dim=8, num_key_value_heads=2,
                          initializer_range=0.2),
        text_config=dict(text_config(tokenizer), model_type="llama", head_dim=8), audio_token_id=tokenizer.convert_tokens_to_ids("[AUDIO]")))


def granite_speech(folder):
    tokenizer = tokens(folder, {}, STRINGS, ["<|start_of_role|>", "<|end_of_role|>", "<|audio|>"])
    t.GraniteSpeechProcessor(t.GraniteSpeechFeatureExtractor(), tokenizer, chat_template=STRINGS).save_pretrained(folder)
    return t.GraniteSpeechForConditionalGeneration(t.GraniteSpeechConfig(
        text_config=dict(text_config(tokenizer), model_type="granite", logits_scaling=4.0, embedding_multiplier=3.0,
                         residual_multiplier=0.5, attention_multiplier=0.3),
        encoder_config=dict(input_dim=160, num_layers=2, hidden_dim=16, num_heads=2, output_dim=8, context_size=20, max_pos_emb=32),
        projector_config=dict(model_type="blip_2_qformer", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
                              encoder_hidden_size=16, cross_attention_frequency=1),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|audio|>"), has_lora_adapter=False, tie_word_embeddings=False))


def audioflamingo3(folder):
    template = LISTS.replace("AUDIO", "<sound>")
    tokenizer = tokens(folder, {}, template, ["<sound>"])
    t.AudioFlamingo3Processor(t.WhisperFeatureExtractor(feature_size=128, return_attention_mask=True), tokenizer,
                              chat_template=template).save_pretrained(folder)
    return t.AudioFlamingo3ForConditionalGeneration(t.AudioFlamingo3Config(
        audio_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, initializer_range=0.2),
        text_config=dict(text_config(tokenizer), model_type="qwen2"), audio_token_id=tokenizer.convert_tokens_to_ids("<sound>")))


def glmasr(folder):
    template = LISTS.replace("AUDIO", "<|begin_of_audio|><|pad|><|end_of_audio|>")
    tokenizer = tokens(folder, {}, template, ["<|begin_of_audio|>", "<|pad|>", "<|end_of_audio|>"])
    t.GlmAsrProcessor(t.WhisperFeatureExtractor(feature_size=128, return_attention_mask=True), tokenizer,
                      chat_template=template).save_pretrained(folder)
    return t.GlmAsrForConditionalGeneration(t.GlmAsrConfig(
        audio_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, head_dim=8, num_key_value_heads=2),
        text_config=dict(text_config(tokenizer), model_type="llama", head_dim=8), audio_token_id=tokenizer.convert_tokens_to_ids("<|pad|>")))


FAMILIES = (qwen2_audio, omni_thinker, omni, voxtral, granite_speech, audioflamingo3, glmasr)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Function from a family to its folder; weights larger than usual, so that every input is felt in every output."""
    @functools.cache
    def folder_of(make):
        folder = tmp_path_factory.mktemp(make.__name__)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make(folder)
            for name, p in model.named_parameters():
                if p.dim() > 1 and not any(part in name for part in ("talker", "token2wav", "embed_positions")):
                    torch.nn.init.normal_(p, std=0.2)
            model.save_pretrained(folder)
        return folder
    return folder_of


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda make: make.__name__)
def family(request, checkpoint):
    return checkpoint(request.param)


ROWS = [{"prompt": "What is the capital of France?"}, {"audio": sound(0.9, 1)}, {"prompt": "Why?", "system": "Be brief."},
        {"audio": sound(1.83, 2), "system": "Be brief."}, {"audio": sound(0.02, 3)}, {"audio": sound(1.1, 4), "instruction": "Who is it?"}]
ANSWERS = ["It is Paris.", "Yes.", "I do not know.", "No", "A dog", "Take two."]


@pytest.fixture(scope="module")
def student(family):
    return m.load_student(str(family))


def plain(folder):
    """The folder's model, as a user of transformers loads it."""
    config = json.loads((folder / "config.json").read_text())
    model = getattr(t, config["architectures"][0]).from_pretrained(folder).eval()
    return getattr(model, "thinker", model)


def plain_inputs(student, row, answer=()):
    """Arguments of the model's own forward and generate."""
    prompt = student.prompt(row)
    ids = torch.tensor([*whole(prompt), *answer])
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **prompt.states}


def whole(prompt):
    return [*prompt.before, *prompt.words, *prompt.after]


def arguments(tiny, student, data, out, *more):
    return train_kd.get_args([str(x) for x in (
        "--teacher", tiny.llm, "--student", student, "--data", data, "--out", out, "--dtype", "float32", "--batch-size", 2,
        "--device", "cpu", "--max-steps", 2, "--lr-warmup-steps", 1, *more)])


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    return tiny.manifest(tmp_path_factory.mktemp("manifest"), 4)


@torch.inference_mode()
def assert_logits_are_those_of(model, student, rows, answers):
    scale, head = m.logit_scale(student.llm), student.llm.get_output_embeddings()
    for row, answer, hidden in zip(rows, answers, hidden_rows(student, rows, answers)):
        ids = m.text_ids(student.tokenizer, answer)
        logits = model(**plain_inputs(student, row, ids)).logits[0]                                       # (T, V)
        # transformers 5.23 forgets the logits_scaling of Granite in GraniteSpeech, with which its text LLM was trained
        logits *= scale if model.config.model_type == "granite_speech" else 1
        assert_close(head(hidden) * scale, logits[-len(ids) - 1:-1], rtol=1e-3, atol=1e-3)


def test_the_rows_give_the_models_own_logits_and_answers(family, student):
    model, end = plain(family), m.end_token(student.tokenizer)
    assert_logits_are_those_of(model, student, ROWS, ANSWERS)
    for row, answer in zip(ROWS, student.generate(ROWS, max_new_tokens=6)):
        inputs = plain_inputs(student, row)
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=end)
        assert answer == student.tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def test_the_rest_of_a_batch_changes_no_row_and_another_clip_only_its_own(student):
    rows = hidden_rows(student, ROWS, ANSWERS)
    changed = hidden_rows(student, ROWS[:3] + [{**ROWS[3], "audio": sound(1.83, 5)}] + ROWS[4:], ANSWERS)
    other = copy.deepcopy(student)
    for part in [*other.parts()["encoder"], *other.parts()["adapter"]]:  # what hears
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    deaf = hidden_rows(other, ROWS, ANSWERS)
    for b, hidden in enumerate(rows):
        assert_close(hidden, hidden_rows(student, ROWS[b:b + 1], ANSWERS[b:b + 1])[0], **CLOSE)
        assert torch.allclose(hidden, changed[b], **CLOSE) == (b != 3)
        assert torch.allclose(hidden, deaf[b], **CLOSE) == ("prompt" in ROWS[b])


def test_rows_are_packed_and_the_template_is_read_once(student):
    prompts, shapes = [student.prompt(row) for row in ROWS[1::2]], []
    hook = student.llm.base_model.register_forward_pre_hook(
        with_kwargs=True, hook=lambda _, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])))
    hidden_rows(student, ROWS[1::2], ["Yes."] * 3)
    hook.remove()
    shared = len(os.path.commonprefix([prompt.before for prompt in prompts]))
    total = sum(m.positions(prompt) + len(m.text_ids(student.tokenizer, "Yes.")) for prompt in prompts)
    assert shapes[-1] == (1, total - 2 * shared) and 0 < shared


def test_training_by_both_channels_ends_in_a_folder_of_plain_transformers(tiny, family, student, data, tmp_path):
    out = tmp_path / "run"
    assert train_kd.main(arguments(tiny, family, data, out, "--train", "encoder", "adapter", "llm", "--lr-encoder", "1e-3",
                                   "--lr-llm", "1e-3", "--eval-data", data)) == 0
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps, evals = [r for r in records if "loss" in r], [r for r in records if "eval_kl_t2t" in r]
    assert [r["step"] for r in steps] == [1, 2] and len(evals) == 2 and evals[1]["eval_kl_t2t"] < evals[0]["eval_kl_t2t"]
    assert all(math.isfinite(r[k]) and r[k] > 0 for r in steps for k in ("ce_t2t", "kd_t2t", "ce_s2t", "kd_s2t", "norm_encoder", "norm_adapter", "norm_llm"))
    trained, model = m.load_student(str(out / "last")), plain(out / "last")
    for name, parts in student.parts().items():
        pairs = zip(torch.nn.ModuleList(parts).parameters(), torch.nn.ModuleList(trained.parts()[name]).parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs), name
    untouched = [n for n, _ in model.named_parameters() if "visual" in n or "bos_eos" in n or "embed_positions" in n]
    for name in untouched:
        assert torch.equal(model.get_parameter(name), student.model.get_parameter(name)), name
    for name, statistic in model.named_buffers():  # of a batch norm
        assert torch.equal(statistic, student.model.get_buffer(name)), name
    assert_logits_are_those_of(model, trained, ROWS[1:2], ANSWERS[1:2])
    assert {p.name for p in family.iterdir()} <= {"spk_dict.pt", *(p.name for p in (out / "last").iterdir())}


# ---- one family at a time ----

def test_a_trained_omni_is_saved_as_its_thinker(tiny, checkpoint, data, tmp_path):
    folder, out = checkpoint(omni), tmp_path / "run"
    train_kd.main(arguments(tiny, folder, data, out, "--dtype", "bfloat16", "--gradient-checkpointing", "--eval-data", data))
    old = {name: value for name, value in load_file(folder / "model.safetensors").items() if name.startswith("thinker.")}
    new = load_file(out / "last/model.safetensors")
    assert old.keys() == new.keys() and not all(torch.equal(old[name], new[name].to(old[name].dtype)) for name in old)
    model = t.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(out / "last")
    assert_logits_are_those_of(model.float().eval(), m.load_student(str(out / "last")), ROWS[1:2], ANSWERS[1:2])


@pytest.mark.parametrize("seconds", [0.1, 0.513, 1.3])
def test_omni_hears_what_its_processor_would_make_of_the_clip(checkpoint, seconds):
    """Which pads to 300 s, masks, and wants torchvision."""
    student, waveform = m.load_student(str(checkpoint(omni))), sound(seconds)
    clip = student.prompt({"audio": waveform})
    assert set(clip.words) == {student.config.audio_token_id}
    padded = student.processor(waveform.numpy(), padding="max_length", return_attention_mask=True, sampling_rate=16_000, return_tensors="pt")
    frames = int(padded.attention_mask.sum())
    assert padded.input_features.shape[-1] == 30_000 and torch.equal(padded.input_features[..., :frames], clip.states["input_features"])
    model, count = student.model.model, len(clip.words)
    heard = model.get_audio_features(padded.input_features, padded.attention_mask).last_hidden_state
    ours = model.get_audio_features(clip.states["input_features"], clip.states["feature_attention_mask"]).last_hidden_state
    assert len(heard) == count and torch.allclose(heard, ours, **CLOSE)


def test_weights_with_an_adapter_beside_them_are_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint(granite_speech), tmp_path / "granite")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="granite: a LoRA adapter lies beside its weights; expected plain ones: merge it"):
        m.load_student(str(folder))
    llm = shutil.copytree(checkpoint(glmasr), tmp_path / "llm")  # a teacher, too: its LoRA would be switched off
    (llm / "adapter_config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="llm: a LoRA adapter lies beside its weights"):
        m.load_llm(str(llm))


@pytest.mark.parametrize("make, seconds", [(qwen2_audio, 30), (omni_thinker, 300)])
def test_a_clip_that_is_longer_than_the_model_hears_is_refused(checkpoint, make, seconds):
    student = m.load_student(str(checkpoint(make)))
    assert student.prompt({"audio": torch.zeros(seconds * 16_000)}).words
    with pytest.raises(ValueError, match=f"a clip of {seconds + 1} s, .* hears {seconds}; cut it"):
        student.prompt({"audio": torch.zeros((seconds + 1) * 16_000)})


def test_voxtrals_windows_of_30_seconds_have_375_embeddings_each(checkpoint):
    student = m.load_student(str(checkpoint(voxtral)))
    assert len(student.prompt({"audio": sound(1.0)}).words) == 375 and len(student.prompt({"audio": sound(31.0)}).words) == 750


@pytest.mark.parametrize("make", [omni, voxtral])
def test_the_text_side_of_a_multimodal_model_can_teach(checkpoint, make):
    teacher, tokenizer = m.load_llm(str(checkpoint(make)))
    model, ids = plain(checkpoint(make)), tokenizer("Why do people like music?", add_special_tokens=False).input_ids
    assert not any("audio" in name or "visual" in name for name, _ in teacher.named_parameters())
    with torch.no_grad():
        logits = model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]
        rows = train_kd.teacher_rows(teacher, [{"teacher_ids": ids[:3], "answer": ids[3:]}])[0]
        assert_close(teacher.get_output_embeddings()(rows), logits[2:-1], **CLOSE)
        assert_close(teacher(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0], logits[-1:], **CLOSE)


def causal(kind, tokenizer, **more):
    return getattr(t, f"{kind}ForCausalLM")(getattr(t, f"{kind}Config")(**text_config(tokenizer, **more))).eval()


@pytest.mark.parametrize("kind, more, scale", [("Granite", dict(logits_scaling=8.0), 0.125), ("Cohere", dict(logit_scale=0.25), 0.25)])
def test_scaled_logits_are_those_of_the_model(tiny, checkpoint, data, tmp_path, kind, more, scale):
    tokenizer = save_tokenizer(tmp_path / "teacher")
    teacher = causal(kind, tokenizer, **more)
    teacher.save_pretrained(tmp_path / "teacher")
    assert m.logit_scale(teacher) == scale
    student, rows = m.load_student(str(checkpoint(granite_speech))), train_kd.read_manifest(data)
    options = arguments(tiny, checkpoint(granite_speech), data, tmp_path / "run", "--channels", "t2t")
    item, head = train_kd.make_item(rows[0], options, student, tokenizer, None), student.llm.get_output_embeddings()
    with torch.no_grad():
        reference, ours = (model(input_ids=torch.tensor([[*prompt, *item["answer"]]])).logits[0, len(prompt) - 1:-1]
                           for model, prompt in ((teacher, item["teacher_ids"]), (student.llm, whole(item["t2t"]))))  # (n, V), (n, V')
        vocab = min(reference.shape[1], ours.shape[1])
        expected = F.kl_div(ours[:, :vocab].log_softmax(-1), reference[:, :vocab].log_softmax(-1), log_target=True, reduction="sum")
    found = train_kd.measure(student, teacher, [item], ["t2t"], contextlib.nullcontext)["t2t"][0][0].sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-4) and m.logit_scale(student.llm) == 0.25
    args = arguments(tiny, checkpoint(granite_speech), data, tmp_path / "run")
    args.teacher = str(tmp_path / "teacher")
    assert train_kd.main(args) == 0


@pytest.mark.parametrize("kind, name", [("Gemma2", "gemma2"), ("Phi", "phi")])
def test_logits_that_are_not_hidden_rows_times_the_head_are_refused(tiny, checkpoint, kind, name):
    """Gemma 2 caps them; Phi's head has a bias."""
    student = m.load_student(str(checkpoint(qwen2_audio)))
    teacher, tokenizer = causal(kind, student.tokenizer), m.load_llm(tiny.llm)[1]
    if getattr(teacher.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(teacher.lm_head.bias)
    with pytest.raises(RuntimeError, match=f"{name}: its logits are capped, or not its hidden rows times its head"):
        train_kd.check_pair(teacher, tokenizer, student)


def test_the_papers_pair_differs_in_special_tokens_padding_and_template_and_passes(checkpoint, data, tiny, tmp_path):
    """As Qwen2.5-7B-Instruct and Qwen2.5-Omni-7B: the same ids, some of them under other names."""
    names = [f"<|box_{i}|>" for i in OMNI_TOKENS]
    tokenizer = tokens(tmp_path / "teacher", {}, tiny_template(tiny), names)
    tokenizer.save_pretrained(tmp_path / "teacher")
    config = t.Qwen2Config(**{**text_config(tokenizer), "vocab_size": len(tokenizer) + 30})
    t.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "teacher")
    args = arguments(tiny, checkpoint(omni), data, tmp_path / "run", "--eval-data", data)
    args.teacher = str(tmp_path / "teacher")
    assert train_kd.main(args) == 0
    student, (teacher, tokenizer) = m.load_student(str(checkpoint(omni))), m.load_llm(args.teacher)
    other = m.load_llm(tiny.llm)[1]
    spec = json.loads(other.backend_tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    a, b = [token for token in vocab if len(token) > 1 and "<" not in token][-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(spec))
    with pytest.raises(RuntimeError, match=f"{tiny.llm} and {checkpoint(omni)} differ"):
        train_kd.check_pair(teacher, other, student)


def tiny_template(tiny):
    return m.load_llm(tiny.llm)[1].chat_template.replace(SYSTEM, "You are another one.")


def test_what_cannot_be_a_student_is_named_with_what_to_do(tiny, checkpoint, data, tmp_path):
    with pytest.raises(RuntimeError, match=r"type 'llama', expected WHISPER\+LLM"):
        m.load_student(tiny.llm)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ultravox", "auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(RuntimeError, match="no .* can be read from it"):
        m.load_student(str(tmp_path))
    student = m.load_student(str(checkpoint(qwen2_audio)))
    with pytest.raises(ValueError, match=r"<\|AUDIO\|> stands in a system message or instruction"):
        student.prompt({"audio": sound(0.5), "instruction": "What is <|AUDIO|>?"})
