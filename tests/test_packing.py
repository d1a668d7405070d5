"""
Packed rows are the rows: the same hidden states, the same gradients, for each kind of LLM that is packed.

  python -m pytest -q tests/test_packing.py                   <- CPU, no download, half a minute
"""
import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import build_student, hidden_rows, sound
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniTextConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerTextModel

import model as m

SIZES = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             initializer_range=0.3, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False)
SHARED, LENGTHS, ANSWERS = 5, [9, 14, 6, 9], [3, 8, 1, 4]
MORE = {"mistral": dict(sliding_window=None), "qwen2_5_omni_text": dict(
    rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1])), "qwen3": dict(head_dim=8), "gemma": dict(head_dim=8)}


class Omni(m.TextLLM):
    """The text side of an Omni thinker, alone."""

    def __init__(self, config):
        m.PreTrainedModel.__init__(self, config)
        self.model = Qwen2_5OmniThinkerTextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)


def build(kind, **more):
    torch.manual_seed(0)
    if kind == "qwen2_5_omni_text":
        return Omni(Qwen2_5OmniTextConfig(**SIZES | more)).train()
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | more)).train()


def rows_of_ids():
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(3, 50, (SHARED,), generator=generator)
    return [torch.cat([start, torch.randint(3, 50, (n - SHARED,), generator=generator)]) for n in LENGTHS]


def one_by_one(llm, rows):
    """What answer_states gives, of each row by itself, through the plain model."""
    return torch.cat([llm.base_model(**{"inputs_embeds" if row.is_floating_point() else "input_ids": row[None]}).last_hidden_state[0, -n - 1:-1]
                      for row, n in zip(rows, ANSWERS)])


def gradients(llm, hidden):
    hidden.backward(torch.linspace(-1, 1, hidden.numel()).view_as(hidden))
    return {name: p.grad.clone() for name, p in llm.named_parameters() if p.grad is not None}


def check(llm, packed, checkpointing=False):
    plain, rows = copy.deepcopy(llm), rows_of_ids()
    if checkpointing:
        llm.gradient_checkpointing_enable()
    found, read, real = m.answer_states(llm, rows, ANSWERS, SHARED)
    expected = one_by_one(plain, rows)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (read, real) == ((SHARED + sum(LENGTHS) - 4 * SHARED,) * 2 if packed else (4 * max(LENGTHS), sum(LENGTHS)))
    found, expected = gradients(llm, found), gradients(plain, expected)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1))


@pytest.mark.parametrize("kind", sorted(m.PACKABLE))
def test_packed_rows_are_read_and_learned_from_as_each_by_itself(kind):
    check(build(kind, **MORE.get(kind, {})), True)


@pytest.mark.parametrize("kind, more", [("mistral", dict(sliding_window=4)), ("gemma2", {}), ("lfm2", {}), ("gpt_neox", {})])
def test_others_are_padded(kind, more):
    check(build(kind, **more), False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packing_goes_with_what_keeps_little(checkpointing):
    llm = build("llama")
    if not checkpointing:
        m.keep_little(llm)
    check(llm, True, checkpointing)


def test_an_attention_that_was_chosen_stays_and_rows_are_padded():
    llm = build("llama")
    llm.set_attn_implementation("eager")
    check(llm, False)


def test_what_is_not_an_answer_may_be_shared_whole():
    llm, row = build("llama"), rows_of_ids()[0]
    found, read, _ = m.answer_states(llm, [row, row], [2, 2], len(row) - 2)  # the first is predicted from a shared position
    assert read == len(row) + 2
    assert_close(found[:2], found[2:])
    assert_close(found[:2], llm.base_model(input_ids=row[None]).last_hidden_state[0, -3:-1], rtol=1e-4, atol=1e-5)


def test_embeddings_are_packed_as_ids_are_and_get_their_gradient():
    llm, rows = build("llama"), rows_of_ids()
    table = llm.get_input_embeddings().weight.detach()
    grads = []
    for read in (lambda e: m.answer_states(llm, e, ANSWERS, SHARED)[0], lambda e: one_by_one(llm, e)):
        embeds = [table[row].requires_grad_() for row in rows]
        hidden = read(embeds)
        hidden.backward(torch.linspace(-1, 1, hidden.numel()).view_as(hidden))
        rest = [e.grad[SHARED:] for e in embeds]
        grads.append([sum(e.grad[:SHARED] for e in embeds if e.grad is not None), *rest])  # what is shared is read from one
    for a, b in zip(*grads):
        assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_student_reads_the_template_once(tiny):
    student = build_student(tiny.student, 0.2, adapter_dim=24, adapter_layers=1, adapter_heads=2).eval()
    rows, answers = [{"audio": sound(0.4 + 0.2 * i, i)} for i in range(3)], ["Yes.", "It is not hard.", "Paris, of course!"]
    alone = [hidden_rows(student, [row], [answer])[0] for row, answer in zip(rows, answers)]
    single, student.positions = student.positions[0], [0, 0]
    together = hidden_rows(student, rows, answers)
    for a, b in zip(together, alone):
        assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert student.positions == [single - 2 * len(m.chat_parts(student.tokenizer)[0])] * 2


class Head(torch.autograd.Function):
    """Stands for an output head: hands a buffer of gradients on."""

    @staticmethod
    def forward(ctx, weight, buffer):
        ctx.buffer = buffer
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return ctx.buffer, None


@pytest.mark.parametrize("ignored", [None, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embeddings_share_one_gradient_buffer(tied, ignored):
    llm = build("llama", tie_word_embeddings=tied, pad_token_id=ignored)
    ids, more, up = torch.tensor([4, 7, 7, 9, 1]), torch.tensor([9, 30]), torch.randn(2, 5, 16)
    embed, buffer = llm.get_input_embeddings(), torch.randn(50, 16)
    (embed(ids) * up[0]).sum().backward()
    (embed(more) * up[1, :2]).sum().backward()
    expected = embed.weight.grad + (buffer if tied else 0)
    llm.zero_grad()
    table = m.Table(llm)
    loss = (table(ids) * up[0]).sum() + (table(more) * up[1, :2]).sum()
    (loss + Head.apply(table.head, buffer)).backward()
    assert_close(embed.weight.grad, expected)
    assert torch.allclose(buffer, expected, atol=1e-6) == tied  # what the head hands on takes the rest in


def test_a_gradient_that_is_one_number_for_all_is_not_written_to():
    llm = build("llama", tie_word_embeddings=True, pad_token_id=None)
    table = m.Table(llm)
    (table(torch.tensor([3, 3])).sum() + table.head.sum()).backward()  # of the sum: a number, expanded
    expected = torch.ones(50, 16).index_fill_(0, torch.tensor([3]), 3.0)
    assert torch.equal(llm.get_input_embeddings().weight.grad, expected)


def test_what_a_scaled_embedding_gives_is_scaled():
    llm = build("gemma3_text", num_hidden_layers=1)
    ids = torch.tensor([5, 6])
    assert torch.equal(m.Table(llm)(ids), llm.get_input_embeddings()(ids))
    assert not torch.equal(m.Table(llm)(ids), llm.get_input_embeddings().weight[ids])


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_packed_attention_keeps_packed_rows_in_the_models_dtype_and_learns_from_them(dtype, most, monkeypatch):
    torch.manual_seed(0)
    packing, module = m.packing_of(LENGTHS, SHARED, "cpu"), SimpleNamespace(num_key_value_groups=2, is_causal=True)
    states = [torch.randn(1, heads, len(packing.back), 8).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    exact = [x.detach().double().requires_grad_() for x in states]
    kept, hooks = [], torch.autograd.graph.saved_tensors_hooks
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", lambda pack, unpack: hooks(
        lambda x: kept.append(pack(x)) or kept[-1], unpack))
    ours, _ = m.packed_attention(module, *states, None, scaling=0.3, packing=packing)
    rows = [[x[:, :, packing.places[row, :n]] for x in exact] for row, n in enumerate(LENGTHS)]
    alone = [m.sdpa_attention_forward(module, *row, None, scaling=0.3)[0][0] for row in rows]
    expected = torch.cat([alone[0], *(x[SHARED:] for x in alone[1:])])[None]
    floats = [x[0] if isinstance(x, tuple) else x for x in kept if isinstance(x, tuple) or x.is_floating_point()]
    assert sum(x.numel() * x.element_size() for x in floats) < 1.3 * sum(x.numel() * x.element_size() for x in [*states, ours])
    up = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(ours, states, up.to(dtype)), torch.autograd.grad(expected, exact, up)):
        assert (a.double() - b).norm() / b.norm() < most
