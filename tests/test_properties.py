"""Properties that hold for any input: readers give rows or one kind of error, losses keep their promises."""
import inspect
import io
import json
import math
import re
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, sound
from hypothesis import HealthCheck, example, given, settings

import eval_mmau
import eval_voicebench as vb
import losses
import model as m
import synth_speech
import train_kd

sys.path.insert(0, str(ROOT / "tools"))
import readable


def fixed(examples):
    """The same examples in every run, without a time limit."""
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


TEXT = st.text(st.characters(codec=None), max_size=40)  # half surrogate pairs as well
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3), max_leaves=6)
KEYS = ["id", "prompt", "response", "audio", "seconds", "finish", "reference", "instruction", "system", "input", "question",
        "instruction_id_list", "kwargs", "score", "choices", "answer", "audio_id", "model_output"]
GOOD = st.sampled_from(["a.flac", "Who is it?", "A", "yes", "navigate_1", ["Paris"], 1.5, ["punctuation:no_comma"], [{}]])
ROWS = st.dictionaries(st.sampled_from(KEYS) | TEXT, GOOD | JSON, max_size=9)
LINES = st.lists(st.binary(max_size=30) | (ROWS | JSON).map(lambda x: json.dumps(x).encode())
                 | ROWS.map(lambda x: json.dumps(x, ensure_ascii=False).encode("utf-8", "surrogatepass")), max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    soundfile.write(folder / "a.flac", sound(0.1).numpy(), 16_000)
    return folder


@fixed(250)
@given(LINES)
@example([b"\xef\xbb\xbf"]).via("a mark alone")
@example([b'{"id": 1, "prompt": "a", "response": "b", "audio": "a.flac"}']).via("a good row")
@example([b"[" * 5000]).via("too deep")
def test_a_reader_gives_rows_or_a_value_error_that_names_the_line(folder, lines):
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    readers = [train_kd.read_manifest, lambda p: m.json_lines(p, synth_speech.to_row), eval_mmau.read_items]
    for read in [*readers, *(lambda p, s=s: vb.read_subset(p, s, "response") for s in ("sd-qa", "mmsu", "bbh", "ifeval", "wildvoice"))]:
        try:
            rows = read(path)
        except ValueError as error:
            assert re.search(r"data\.jsonl:( item)? ?\d+|expected a list of objects|items have answers|no rows of", str(error)), error
        else:
            assert all(isinstance(row, dict) for row in rows)
            json.dumps(rows, ensure_ascii=False).encode()


@fixed(150)
@given(LINES)
def test_bad_rows_and_good_rows_are_all_rows(folder, lines):
    path, bad = folder / "data.jsonl", []
    path.write_bytes(b"\n".join([b'{"id": "x", "prompt": "a", "response": "b"}', *lines]))
    rows = train_kd.read_manifest(path, bad=bad)
    kept = [line for line in path.read_bytes().split(b"\n") if line.removeprefix(b"\xef\xbb\xbf").strip()]
    assert len(rows) + len(bad) == len(kept) and rows[0]["id"].endswith("/x") and all(str(path) in row["reason"] for row in bad)


# ---- texts ----

SAID = st.text(max_size=60) | st.text("ab 1,.%$&-\u2014\u201c*#\n", max_size=60)


@fixed(150)
@given(SAID)
def test_the_filter_gives_a_known_reason_and_white_space_does_not_matter(text):
    reasons = {None, "empty", "too long", "url", "code", "table", "mark-up", "other script", "not plain text"}
    reason, tidy = synth_speech.unspeakable(text, 40), synth_speech.tidy(text)
    assert reason in reasons and synth_speech.tidy(tidy) == tidy == tidy.strip()
    assert reason or synth_speech.unspeakable(tidy, 41) in (None, "too long", "mark-up", "code")
    assert synth_speech.fingerprints(text) == synth_speech.fingerprints(text.upper()) or text.lower() != text.upper().lower()


@fixed(200)
@given(st.text("ab 0123456789,.%$&+\u00b0-", max_size=40))
def test_numbers_become_words_once(text):
    pytest.importorskip("num2words")
    words = readable.readable(text)
    assert not re.search(r"[0-9%$&+]", words) and readable.readable(words) == words


@fixed(300)
@given(SAID, SAID)
def test_qa_match_finds_what_is_there_and_normalising_twice_changes_nothing(a, b):
    words = vb.normal_words(a)
    assert vb.normal_words(words) == words and words == words.lower()
    assert vb.qa_match(f"{b} {a} {b}", a) or not words.strip() or words.strip() not in vb.normal_words(f"{b} {a} {b}")
    assert vb.qa_match(b, [a, a]) == vb.qa_match(b, a) and isinstance(vb.qa_match(b, a), bool)


ANSWERS = SAID | st.text("ABCDabcd ().:*[]\"'the answer is not yes no\n", max_size=80) | st.lists(st.sampled_from(
    ["The answer is", "(B)", "A.", "not", "Yes", "no", "option", "plausible", "lies", "<think>", "</think>", "correct", "\n", "1", "5/5"]),
    max_size=9).map(" ".join)


@fixed(400)
@given(ANSWERS)
def test_readers_of_answers_never_raise_and_give_what_is_allowed(text):
    assert vb.extract_choice(text) in (None, "A", "B", "C", "D")
    assert all(vb.extract_bbh(text, task) in (None, 0, 1) for task in ("hyperbaton", *vb.STATEMENTS))
    assert vb.is_refusal(text) in (True, False) and vb.read_vote(text) in (None, True, False)
    assert vb.read_score(text) is None or 1 <= vb.read_score(text) <= 5
    assert vb.grade("sd-qa", {"response": "", "reference": "x"}, [text, "yes"])[0][1] in ((0.5, True), (1, True))
    assert vb.count_sentences(text) >= 0 and vb.count_capitals(text) >= 0
    choices = ["a bus", "a tram", "B"]
    assert eval_mmau.read_option(text, choices) in (*choices, text)
    assert all(eval_mmau.string_match(c, c, choices) for c in choices)


ARGUMENTS = {"keywords": ["walk"], "keyword": "walk", "forbidden_words": ["sea"], "letter": "a", "relation": "at least", "frequency": 1,
             "let_relation": "less than", "let_frequency": 3, "num_sentences": 1, "num_paragraphs": 1, "num_words": 2, "nth_paragraph": 1,
             "first_word": "the", "num_placeholders": 1, "postscript_marker": "P.S.", "num_bullets": 1, "num_highlights": 1,
             "section_spliter": "Section", "num_sections": 1, "prompt_to_repeat": "So", "end_phrase": "end", "capital_relation": "at least",
             "capital_frequency": 1}


@fixed(200)
@given(ANSWERS | st.text("*[]<>P.S \n\"{}:,-Section12", max_size=60))
def test_ifeval_checks_never_raise_and_loose_is_no_stricter_than_strict(text):
    names = [name for name in vb.IFEVAL if "language" not in name and "english" not in name]  # those need a package
    kwargs = []
    for name in names:
        needs = list(inspect.signature(vb.IFEVAL[name]).parameters)[1:]
        kwargs.append({key: ARGUMENTS[key] for key in needs})
    marks = vb.check_ifeval(text, names, kwargs)
    assert all(isinstance(x, bool) for kind in marks.values() for x in kind) and len(marks["strict"]) == len(names)
    assert all(loose or not strict for strict, loose in zip(marks["strict"], marks["loose"]))


# ---- losses ----

def logits(rows, vocab, size):
    return st.lists(st.floats(-size, size, width=32), min_size=rows * vocab, max_size=rows * vocab).map(
        lambda x: torch.tensor(x, dtype=torch.float32).view(rows, vocab))


KINDS = pytest.mark.parametrize("kind", losses.DIVERGENCES)


@KINDS
@fixed(60)
@given(logits(2, 5, 20), logits(2, 5, 20), st.sampled_from([0.5, 1.0, 4.0]), st.floats(-50, 50))
def test_a_divergence_is_zero_for_equals_not_negative_blind_to_shifts_and_a_sum(kind, a, b, tau, shift):
    def loss(student, teacher):
        return losses.DIVERGENCES[kind](student_logits=student, teacher_logits=teacher, temperature=tau)
    tolerance = dict(rel_tol=1e-3, abs_tol=2e-4 * tau**2)
    assert math.isclose(loss(a, a), 0, **tolerance) and loss(a, b) >= -2e-4 * tau**2
    assert math.isclose(loss(a + shift, b - shift), loss(a, b), **tolerance)
    assert math.isclose(loss(a[:1], b[:1]) + loss(a[1:], b[1:]), loss(a, b), **tolerance)


@KINDS
@fixed(40)
@given(logits(2, 4, 65504), logits(2, 4, 65504), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@example(torch.full((2, 4), 65504.0), torch.full((2, 4), -65504.0), torch.float16).via("all of fp16's range")
def test_gradients_of_finite_logits_are_finite(kind, a, b, dtype):
    student, teacher = a.to(dtype).clamp(-6e4, 6e4).requires_grad_(), b.to(dtype).clamp(-6e4, 6e4)
    loss = losses.DIVERGENCES[kind](student_logits=student, teacher_logits=teacher)
    (loss + losses.cross_entropy(student_logits=student, targets=torch.tensor([0, 3]))).backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@KINDS
@fixed(40)
@given(logits(3, 4, 8), logits(3, 4, 8), logits(5, 4, 8), st.integers(1, 4), st.sampled_from([1.0, 2.0]))
def test_the_fused_loss_is_the_plain_one_whatever_the_chunks(kind, student, teacher, head, chunk_rows, tau):
    targets = torch.tensor([0, 4, 2])
    hidden = student.clone().requires_grad_()
    fused, ce, kd = losses.fused_ce_kd(
        student_hidden=hidden, student_weight=head, teacher_hidden=teacher, teacher_weight=head, targets=targets, kind=kind,
        temperature=tau, chunk_rows=chunk_rows)
    plain = student.clone().requires_grad_()
    rows = plain @ head.T, teacher @ head.T
    options = dict(beta=0.5) if kind in ("jsd", "skew_kl") else {}
    by_hand = (losses.cross_entropy(student_logits=rows[0], targets=targets),
               losses.DIVERGENCES[kind](student_logits=rows[0], teacher_logits=rows[1], temperature=tau, **options))
    assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-3) for x, y in zip((ce, kd), by_hand))
    fused.backward()
    (by_hand[0] + 0.5 * by_hand[1]).backward()
    assert torch.isfinite(hidden.grad).all() and torch.allclose(hidden.grad, plain.grad, rtol=1e-2, atol=1e-2 * (1 + plain.grad.abs().max()))


# ---- audio ----

def encoded(kind, subtype):
    file = io.BytesIO()
    soundfile.write(file, sound(0.3).numpy(), 16_000, format=kind, subtype=subtype)
    return file.getvalue()


FILES = {f"{kind} {subtype}": encoded(kind, subtype) for kind, subtype in (
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16"), ("AU", "PCM_24"))}
EDITS = st.lists(st.tuples(st.integers(0, 120) | st.integers(0, 20_000), st.integers(0, 255)), max_size=6)


@pytest.mark.parametrize("kind", FILES)
@fixed(80)
@given(edits=EDITS, length=st.none() | st.integers(0, 20_000), tail=st.binary(max_size=8))
@example([], None, b"").via("as it is")
def test_audio_that_is_changed_or_cut_gives_a_waveform_or_a_value_error(kind, tmp_path_factory, edits, length, tail):
    data = bytearray(FILES[kind][:length] + tail)
    for at, value in edits:
        if data:
            data[at % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "clip"
    path.write_bytes(data)
    try:
        waveform = m.load_audio(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert waveform.dtype == torch.float32 and waveform.dim() == 1 and torch.isfinite(waveform).all() and len(waveform) >= 300
        assert len(waveform) <= m.MAX_SECONDS * m.SAMPLE_RATE


@fixed(25)
@given(samples=st.lists(st.floats(width=32, allow_nan=True), min_size=9, max_size=9).map(lambda x: np.float32(x * 50)))
def test_any_samples_are_heard_in_finite_numbers_or_are_a_value_error(samples, folder, tiny_student):
    soundfile.write(folder / "any.wav", samples, 16_000, subtype="FLOAT")
    try:
        heard = tiny_student.hear([m.load_audio(folder / "any.wav")])[0]
    except ValueError as error:
        assert "of -1 to 1; fetch it again, or scale it" in str(error)
    else:
        assert torch.isfinite(heard.states).all() and torch.isfinite(heard.sound).all() and len(heard.sound)
