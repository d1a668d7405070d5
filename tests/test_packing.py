"""
Packed rows are the rows: the same hidden states, the same gradients, for each kind of LLM that is packed.

  python -m pytest -q tests/test_packing.py                   <- CPU, no download, half a minute
"""
import copy

import pytest
import torch
from conftest import hidden_rows, sound
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import model as m

SIZES = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=4, initializer_range=0.3, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False)
SHARED, LENGTHS, ANSWERS = 5, [9, 14, 6, 9], [3, 8, 1, 4]
PACKED = [  # families of LLMs that people give as a teacher
    "llama", "qwen2", "qwen3", "mistral", "gemma", "granite", "cohere", "olmo2", "phi3", "smollm3", "gpt_neox"]
EXACT = dict(rtol=2e-5, atol=5e-6)  # float32 sums in another order, of values of size 1


def build(kind, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | more)).train()


def rows_of_ids():
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(3, 50, (SHARED,), generator=generator)
    return [torch.cat([start, torch.randint(3, 50, (n - SHARED,), generator=generator)]) for n in LENGTHS]


def one_by_one(llm, rows):
    """What answer_states gives, of each row by itself, through the plain model."""
    return torch.cat([llm.base_model(**{"inputs_embeds" if row.is_floating_point() else "input_ids": row[None]}).last_hidden_state[0, -n - 1:-1]
                      for row, n in zip(rows, ANSWERS)])


def learn(hidden):
    hidden.backward(torch.linspace(-1, 1, hidden.numel()).view_as(hidden))


def read(llm, packed, rows=None, answers=ANSWERS, shared=SHARED):
    """answer_states, which must read the rows this way."""
    shapes = []
    hook = llm.base_model.register_forward_pre_hook(with_kwargs=True, hook=lambda _, args, kwargs: shapes.append(
        next(kwargs[name].shape[:2] for name in ("input_ids", "inputs_embeds") if name in kwargs)))
    found = m.answer_states(llm, rows_of_ids() if rows is None else rows, answers, shared)
    hook.remove()
    whole = (1, SHARED + sum(LENGTHS) - 4 * SHARED), (4, max(LENGTHS))
    assert rows is not None or shapes == [whole[not packed]]
    return found


def check(llm, packed):
    plain = copy.deepcopy(llm)
    found, expected = read(llm, packed), one_by_one(plain, rows_of_ids())
    assert_close(found, expected, **EXACT)
    for hidden in (found, expected):
        learn(hidden)
    for (name, p), q in zip(llm.named_parameters(), plain.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            error = (p.grad - q.grad).norm()
            assert error <= 1e-5 * q.grad.norm() + 1e-6, (name, error)


@pytest.mark.parametrize("kind", PACKED)
def test_packed_rows_are_read_and_learned_from_as_each_by_itself(kind):
    check(build(kind, **dict(sliding_window=None) if kind == "mistral" else {}), True)


@pytest.mark.parametrize("kind, more", [
    ("mistral", dict(sliding_window=13)), ("lfm2", dict(layer_types=["conv", "full_attention"])), ("mamba", {}), ("gemma2", dict(sliding_window=13)),
    ("recurrent_gemma", dict(attention_window_size=32, lru_width=16))], ids=lambda x: x if isinstance(x, str) else "")
def test_short_windows_convolutions_and_recurrence_are_padded(kind, more):
    check(build(kind, **more), False)


def test_a_window_that_no_row_outgrows_is_packed():
    check(build("mistral", sliding_window=14), True)


def test_an_attention_that_was_chosen_stays_and_rows_are_padded():
    llm = build("llama")
    llm.set_attn_implementation("eager")
    check(llm, False)


def test_a_mask_that_would_be_too_large_is_not_made(monkeypatch):
    assert m.PACKED_POSITIONS == 4096
    total = SHARED + sum(LENGTHS) - 4 * SHARED
    for limit, packed in ((total, True), (total - 1, False)):
        monkeypatch.setattr(m, "PACKED_POSITIONS", limit)
        check(build("llama"), packed)


def test_recomputed_layers_learn_the_same_from_packed_rows():
    llm = build("llama")
    llm.gradient_checkpointing_enable()
    check(llm, True)


def test_what_predicts_a_token_may_lie_in_what_is_shared():
    llm, row = build("llama"), rows_of_ids()[0]
    for shared in (len(row) - 2, len(row)):  # an answer of two, then nothing at all behind what is shared
        found = read(llm, True, [row, row], [2, 2], shared)
        assert_close(found[:2], found[2:])
        assert_close(found[:2], llm.base_model(input_ids=row[None]).last_hidden_state[0, -3:-1], **EXACT)


def test_embeddings_are_packed_as_ids_are_and_get_their_gradient():
    llm, rows, grads = build("llama"), rows_of_ids(), []
    table = llm.get_input_embeddings().weight.detach()
    for states in (lambda e: read(llm, True, e), lambda e: one_by_one(llm, e)):
        embeds = [table[row].requires_grad_() for row in rows]
        learn(states(embeds))
        grads.append([sum(e.grad[:SHARED] for e in embeds), *(e.grad[SHARED:] for e in embeds)])  # what is shared is read from one
    for a, b in zip(*grads):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_student_reads_the_template_once(tiny_student):
    rows, answers = [{"audio": sound(0.4 + 0.2 * i, i)} for i in range(3)], ["Yes.", "It is not hard.", "Paris, of course!"]
    alone = [hidden_rows(tiny_student, [row], [answer])[0] for row, answer in zip(rows, answers)]
    sizes = [m.positions(tiny_student.prompt(row)) + len(m.text_ids(tiny_student.tokenizer, a)) for row, a in zip(rows, answers)]
    at_once = []
    hook = tiny_student.llm.base_model.register_forward_pre_hook(
        with_kwargs=True, hook=lambda _, args, kwargs: at_once.append(kwargs["inputs_embeds"].shape[1]))
    for a, b in zip(hidden_rows(tiny_student, rows, answers), alone):
        assert_close(a, b, rtol=1e-4, atol=1e-4)
    hook.remove()
    assert at_once == [sum(sizes) - 2 * len(m.chat_parts(tiny_student.tokenizer)[0])]


def test_no_script_uses_the_attention_whose_backward_gives_nan_under_a_mask():
    """tests/test_gpu.py shows what it does (pytorch#196678)."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    m.start_processes("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_processes_share_the_cores_and_wait_for_the_one_that_writes_a_checkpoint(monkeypatch):
    """91 GB of a 7 B model take longer than torch's own ten minutes."""
    waits, threads, cores = [], [], m.cores()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():  # as torchrun sets them
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(m.dist, "init_process_group", lambda backend, timeout: waits.append(timeout.total_seconds()))
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert m.start_processes("cpu") == (0, 2) and waits[0] >= 3600 and threads == [max(1, cores // 2)]
