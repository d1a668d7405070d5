"""
What each loss in losses.py promises, one behaviour per test; read it beside losses.py.

  python -m pytest -q test_losses.py                             <- CPU, no download, about 10 s
"""
import inspect
import math
import os
import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import losses
from losses import (DIVERGENCES, IGNORE_INDEX, cross_entropy, fused_ce_kd, jsd, response_rows,
                    skew_kl, token_kl)

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")
LOSSES = ["cross_entropy", *DIVERGENCES, "fused_ce_kd"]
every_loss = pytest.mark.parametrize("name", LOSSES)
every_kind = pytest.mark.parametrize("kind", DIVERGENCES)
every_temperature = pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
ROUNDING = dict(rtol=1e-5, atol=1e-5)  # float32: 1e-7 for each of < 100 terms of size 1


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waking a second one for 35 numbers doubles the time of this file
    yield
    torch.set_num_threads(threads)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(loss, tensor):
    return torch.autograd.grad(loss, tensor)[0]


def row_loss(name, student_logits, teacher_logits, targets=None, beta=None, **options):
    """Any loss on rows (N, V), by name. fused_ce_kd gets logits too: its heads are the identity."""
    if name in DIVERGENCES:
        options.update({"beta": beta} if beta and name in ("jsd", "skew_kl") else {})
        return DIVERGENCES[name](student_logits=student_logits, teacher_logits=teacher_logits,
                                 **options)
    if name == "cross_entropy":
        return cross_entropy(student_logits=student_logits, targets=targets)
    head = torch.eye(student_logits.shape[-1], dtype=student_logits.dtype)
    return fused_ce_kd(student_hidden=student_logits, student_weight=head, teacher_weight=head,
                 teacher_hidden=teacher_logits, targets=targets, chunk_rows=2)[0]


# Rows (N = 5, V = 7) of a student, which get a gradient, and of a teacher that disagrees.
ROWS = (randn(5, 7, seed=0) * 2).requires_grad_(), randn(5, 7, seed=1) * 2
PAIR = dict(student_logits=ROWS[0], teacher_logits=ROWS[1])
TARGETS = torch.arange(5)


# ---- 1. by hand: which way round, ln and not log2, sum and not mean ----
@pytest.mark.parametrize("name, beta, nats", [
    ("cross_entropy", None, 1.3863),  # -ln .5 - ln .5
    ("forward_kl", None, 0.1308),  # KL(t || s) = .75 ln(.75/.5) + .25 ln(.25/.5) = .3041 - .1733
    ("reverse_kl", None, 0.1438),  # KL(s || t) = .5 ln(.5/.75) + .5 ln(.5/.25) = -.2027 + .3466
    ("jsd", None, 0.0338),  # m = [.625 .375]: KL(t || m) = .0354, KL(s || m) = .0323; half of each
    # m = .1 t + .9 s = [.525 .475]: KL(t || m) = .1070, KL(s || m) = .0013; .1 and .9 of them
    ("jsd", 0.1, 0.0118),
    # the same m, KL(t || m) alone = .75 ln(.75/.525) + .25 ln(.25/.475) = .2675 - .1605
    ("skew_kl", None, 0.1070),
])
def test_a_loss_has_the_value_computed_by_hand(name, beta, nats):
    # s = [.5 .5] and t = [.75 .25]; in a second row the two agree, which adds 0 to a divergence
    student, teacher = torch.tensor([[[.5, .5], [.5, .5]], [[.75, .25], [.5, .5]]]).log()
    value = row_loss(name, student, teacher, torch.tensor([0, 1]), beta)
    assert value.item() == pytest.approx(nats, abs=1e-4)  # four digits are written above


# ---- 2. second implementations ----
def plain_softmax(row, temperature):
    powers = [math.exp(logit / temperature) for logit in row]
    return [power / sum(powers) for power in powers]


@every_temperature
def test_the_divergences_agree_with_plain_python_loops(temperature):
    expected, beta = dict.fromkeys(DIVERGENCES, 0), 0.3
    for student, teacher in zip(ROWS[0].tolist(), ROWS[1].tolist()):
        s, t = plain_softmax(student, temperature), plain_softmax(teacher, temperature)
        m = [beta * b + (1 - beta) * a for a, b in zip(s, t)]
        for kind, w, p, q in [("forward_kl", 1, t, s), ("reverse_kl", 1, s, t),
                              ("skew_kl", 1, t, m), ("jsd", beta, t, m), ("jsd", 1 - beta, s, m)]:
            expected[kind] += w * temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q))
    for kind in DIVERGENCES:
        value = row_loss(kind, *ROWS, temperature=temperature, beta=beta)
        # The loops are float64. Terms of size 1 cancel to a sum of 0.4 or more: 1e-7 becomes 1e-6.
        assert value.item() == pytest.approx(expected[kind], rel=1e-5)


@every_temperature
def test_both_directions_of_kl_agree_with_torch(temperature):
    log_s, log_t = (F.log_softmax(x / temperature, dim=-1) for x in ROWS)
    # F.kl_div(input, target) is KL(target || input): the reverse of the order in the formula
    for kind, log_q, log_p in ("forward_kl", log_s, log_t), ("reverse_kl", log_t, log_s):
        expected = F.kl_div(log_q, log_p, log_target=True, reduction="sum") * temperature**2
        torch.testing.assert_close(row_loss(kind, *ROWS, temperature=temperature), expected,
                                   **ROUNDING)


# ---- 3. what makes it a divergence ----
@every_kind
def test_a_divergence_is_zero_for_equal_inputs_and_positive_otherwise(kind):
    # log(p/2 + p/2) differs from log(p) by 1e-7, 35 times
    assert abs(row_loss(kind, ROWS[0], ROWS[0])) < 1e-5
    assert all(row_loss(kind, *pair) > 0.01 for pair in zip(*ROWS))


@every_loss
def test_adding_a_constant_to_a_row_of_logits_changes_nothing(name):
    shift = torch.tensor([[-9.0], [-1.0], [0.0], [3.0], [11.0]])
    value = row_loss(name, ROWS[0] + shift, ROWS[1] - shift, TARGETS)
    # a logit of 13 is rounded to 1e-6, and 35 of them count
    torch.testing.assert_close(value, row_loss(name, *ROWS, TARGETS), rtol=1e-5, atol=5e-5)


# ---- 4. to 7. which positions count ----
X = IGNORE_INDEX                           # prompt, audio or padding
LABELS = torch.tensor([[X, X, 3, 4, X],    # a prompt of two, an answer of two, one padding
                       [5, 2, X, X, 6]])   # no position comes before the 5: nothing predicts it
PREDICTS = torch.tensor([[0, 1, 1, 0, 0],  # 1 = predicts a supervised token: the one AFTER it
                         [1, 0, 0, 1, 0]], dtype=torch.bool)
SEQUENCES = randn(2, 5, 7, seed=2).requires_grad_(), randn(2, 5, 7, seed=3)


def sequence_loss(name, student_logits, teacher_logits, labels):
    """(B, T, V) and (B, T), as a training loop does it: select the rows, then compare them."""
    student_rows, targets = response_rows(student_logits, labels)
    return row_loss(name, student_rows, response_rows(teacher_logits, labels)[0], targets)


def test_response_rows_gives_each_target_the_position_before_it():
    rows, targets = response_rows(SEQUENCES[0], LABELS)
    assert targets.tolist() == [3, 4, 2, 6] and torch.equal(rows, SEQUENCES[0][PREDICTS])


@every_loss
def test_gradient_reaches_exactly_the_positions_that_predict_supervised_tokens(name):
    grad = gradient(sequence_loss(name, *SEQUENCES, LABELS), SEQUENCES[0])
    assert torch.equal(grad.abs().sum(-1) > 0, PREDICTS)


@every_loss
def test_ignored_positions_and_padding_change_neither_loss_nor_gradient(name):
    noise = torch.where(PREDICTS[..., None], 0, math.inf)  # 0 * inf is NaN: a product would show
    noisy = [F.pad(x + noise, (0, 0, 0, 3), value=9.0) for x in SEQUENCES]  # (2, 5 + 3, 7)
    loss = sequence_loss(name, *SEQUENCES, LABELS)
    noisy_loss = sequence_loss(name, *noisy, F.pad(LABELS, (0, 3), value=X))
    assert torch.equal(noisy_loss, loss)  # to the bit: the selected rows are the same
    assert torch.equal(gradient(noisy_loss, SEQUENCES[0]), gradient(loss, SEQUENCES[0]))


@every_loss
def test_the_losses_of_the_parts_of_a_batch_add_up_to_the_loss_of_the_batch(name):
    batch = (*SEQUENCES, LABELS)
    first, second = (sequence_loss(name, *rows) for rows in zip(*map(torch.chunk, batch, (2,) * 3)))
    torch.testing.assert_close(first + second, sequence_loss(name, *batch), **ROUNDING)


@every_loss
def test_without_supervised_tokens_the_loss_is_zero_and_backward_works(name):
    loss = sequence_loss(name, *SEQUENCES, torch.full_like(LABELS, X))
    grad = gradient(loss, SEQUENCES[0])  # in DDP the other ranks wait for it
    assert loss.item() == 0 and grad.count_nonzero() == 0


# ---- 8. precision ----
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_loss
def test_at_logits_of_200_all_is_finite_and_bfloat16_input_loses_nothing(name, dtype):
    logits = [(randn(5, 7, seed=seed).sign() * 200).to(dtype).requires_grad_() for seed in (4, 5)]
    loss = row_loss(name, *logits, TARGETS)  # e^-400 is 0 in float32
    assert 0 < loss < math.inf and gradient(loss, logits[0]).isfinite().all()
    # to the bit: bfloat16 holds 200 exactly, and what comes after is float32
    assert torch.equal(loss, row_loss(name, *(x.float() for x in logits), TARGETS))


@every_loss
def test_autocast_to_bfloat16_changes_neither_loss_nor_gradient(name):
    with torch.autocast("cpu", torch.bfloat16):
        loss = row_loss(name, *ROWS, TARGETS)
    expected = row_loss(name, *ROWS, TARGETS)
    assert torch.equal(loss, expected)  # to the bit: the same operations
    assert torch.equal(gradient(loss, ROWS[0]), gradient(expected, ROWS[0]))


# ---- 9. gradient accumulation and DDP: sum / tokens of the WHOLE step * world size ----
def ddp_setup():
    """Linear model; inputs, teacher states and labels of a sequence per rank and micro-batch."""
    model, labels = torch.nn.Linear(3, 5, bias=False), torch.full((4, 6), X)
    model.load_state_dict({"weight": randn(5, 3, seed=6)})
    for row, length in zip(labels, (5, 0, 1, 2)):  # rank 0: 5 and 0 tokens, rank 1: 1 and 2
        row[1:1 + length] = torch.arange(length)
    return model, (randn(4, 6, 3, seed=7), randn(4, 6, 4, seed=8), labels)


def ddp_loss(model, inputs, teacher_states, labels):
    student_hidden, targets = response_rows(model(inputs), labels)
    return fused_ce_kd(student_hidden=student_hidden, student_weight=randn(7, 5, seed=9),
                 teacher_hidden=response_rows(teacher_states, labels)[0],
                 teacher_weight=randn(7, 4, seed=10), targets=targets, chunk_rows=2)[0]


def ddp_worker(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/init", timedelta(minutes=2), 2, rank)
    model, batch = ddp_setup()
    ddp_model = torch.nn.parallel.DistributedDataParallel(model)
    parts = [x.chunk(4)[2 * rank:2 * rank + 2] for x in batch]
    first, last = zip(*parts)
    num_tokens = (first[-1] != X).sum() + (last[-1] != X).sum()
    dist.all_reduce(num_tokens)
    with ddp_model.no_sync():
        (ddp_loss(ddp_model, *first) * 2 / num_tokens).backward()  # 2 = world size
    (ddp_loss(ddp_model, *last) * 2 / num_tokens).backward()
    torch.save(model.weight.grad, folder / f"{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # an interpreter that ends beside gloo's threads is aborted now and then


def test_two_processes_with_two_uneven_micro_batches_equal_one_with_the_full_batch(tmp_path):
    # none of the two is this process: a group that it failed to make before would count here
    torch.multiprocessing.spawn(ddp_worker, (tmp_path,), nprocs=2)
    grad = torch.load(tmp_path / "1.pt")
    model, batch = ddp_setup()
    (ddp_loss(model, *batch) / 8).backward()  # 5 + 0 + 1 + 2 tokens
    # float32 rounding of gradients of size 1; a mean of the four means is off by 1.1
    torch.testing.assert_close(grad, model.weight.grad, rtol=1e-6, atol=1e-6)


# ---- fused_ce_kd: heads and losses in one, by chunks ----
def head_inputs(student_vocab=7, teacher_vocab=9):
    return dict(student_hidden=randn(11, 5, seed=11).requires_grad_(),
                student_weight=randn(student_vocab, 5, seed=12).requires_grad_(),
                teacher_hidden=randn(11, 4, seed=13).requires_grad_(),
                teacher_weight=randn(teacher_vocab, 4, seed=14).requires_grad_(),
                targets=torch.arange(11) % 7)


@pytest.mark.parametrize("chunk_rows", [4, 256])      # 4 + 4 + 3 rows, and all at once
@pytest.mark.parametrize("vocabs", [(7, 9), (9, 7)])  # padded differently, 7 tokens in common
@every_kind
def test_fused_ce_kd_equals_the_plain_losses_on_full_logits(kind, vocabs, chunk_rows):
    inputs = head_inputs(*vocabs)
    student_hidden, student_weight, teacher_hidden, teacher_weight, targets = inputs.values()
    loss, *sums = fused_ce_kd(**inputs, kind=kind, temperature=1.5, beta=0.3, ce_weight=0.7,
                        kd_weight=0.2, chunk_rows=chunk_rows)
    assert not any(x.requires_grad for x in sums)
    student_logits = (student_hidden @ student_weight.T)[:, :7]
    teacher_logits = (teacher_hidden @ teacher_weight.T)[:, :7]
    ce = cross_entropy(student_logits=student_logits, targets=targets)
    kd = row_loss(kind, student_logits, teacher_logits, temperature=1.5, beta=0.3)
    expected = 0.7 * ce + 0.2 * kd
    torch.testing.assert_close((loss, *sums), (expected, ce, kd), **ROUNDING)
    grads = (torch.autograd.grad(x, (student_hidden, student_weight)) for x in (loss, expected))
    torch.testing.assert_close(*grads, **ROUNDING)


def test_fused_ce_kd_gives_no_gradient_to_a_frozen_head_nor_to_the_teacher():
    trainable, frozen = head_inputs(), head_inputs()
    frozen["student_weight"].requires_grad_(False)
    for inputs in (trainable, frozen):
        fused_ce_kd(**inputs)[0].backward()
    assert torch.equal(frozen["student_hidden"].grad, trainable["student_hidden"].grad)
    assert all(frozen[x].grad is None for x in frozen if x != "student_hidden")


# ---- what evaluation reports ----
@pytest.mark.parametrize("chunk_rows", [1, 4, 64])
@pytest.mark.parametrize("vocabs", [(7, 9), (9, 7)])  # padded differently, 7 tokens in common
def test_token_kl_is_the_divergence_of_each_row_on_full_logits(vocabs, chunk_rows, monkeypatch):
    inputs = {name: x for name, x in head_inputs(*vocabs).items() if name != "targets"}
    made, log_softmax = [], torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax",
                        lambda x, dim: made.append(x.shape) or log_softmax(x, dim))
    kl, agree, overlap = token_kl(**inputs, student_logit_scale=0.5, teacher_logit_scale=2.0,
                         chunk_rows=chunk_rows)
    monkeypatch.undo()
    assert max(made) == (min(chunk_rows, 11), 7)  # never more logits at a time
    student, teacher = ((scale * inputs[f"{name}_hidden"] @ inputs[f"{name}_weight"].T)[:, :7]
                        for name, scale in (("student", 0.5), ("teacher", 2.0)))
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close(kl, (log_t.exp() * (log_t - log_s)).sum(-1), **ROUNDING)
    assert agree.tolist() == (student.argmax(-1) == teacher.argmax(-1)).tolist()
    assert kl.dtype == torch.float32 and 0 < agree.sum() < 11 and (overlap == 1).all()  # 7 of 64


def test_token_kl_of_half_precision_is_computed_in_float32_and_of_no_rows_is_empty():
    inputs = {name: x.detach().bfloat16() for name, x in head_inputs().items() if name != "targets"}
    kl, *_ = token_kl(**inputs)
    exact, *_ = token_kl(**{name: x.float() for name, x in inputs.items()})
    assert torch.equal(kl, exact) and (kl > 0).all()
    kl, agree, overlap = token_kl(**inputs | {name: inputs[name][:0] for name in ("student_hidden",
                                                                         "teacher_hidden")})
    assert kl.shape == agree.shape == overlap.shape == (0,)


# ---- 10. wrong input ----
@pytest.mark.parametrize("loss, arguments, found", [
    (response_rows, dict(logits=SEQUENCES[0], labels=LABELS[:, 1:]), ["(2, 5, 7)", "(2, 4)"]),
    (cross_entropy, dict(student_logits=ROWS[0], targets=TARGETS[1:]), ["(5)", "(4)"]),  # torch's
    *((x, PAIR | {"teacher_logits": ROWS[1][:, 1:]}, ["(5, 7)", "(5, 6)"])
      for x in DIVERGENCES.values()),
    *((x, PAIR | {"temperature": t}, [f"temperature is {t},"])
      for x in DIVERGENCES.values() for t in (0, -1)),
    *((x, PAIR | {"beta": b}, [f"beta is {b},"]) for x in (jsd, skew_kl) for b in (-0.1, 0, 1, 2)),
    (fused_ce_kd, head_inputs() | {"targets": TARGETS}, ["student 11", "teacher 11", "targets 5"]),
    (fused_ce_kd, head_inputs(6, 8), ["index 6 is out of bounds", "size 6"]),  # torch's
])
def test_wrong_input_raises_and_the_message_says_what_was_found(loss, arguments, found):
    with pytest.raises((ValueError, RuntimeError), match=".*".join(map(re.escape, found))):
        loss(**arguments)


def test_large_half_precision_states_do_not_overflow_before_the_loss():
    hidden = torch.full((20, 5), 1000.0, dtype=torch.float16)  # their sum is no fp16
    head = torch.eye(7, 5, dtype=torch.float16)
    sums = fused_ce_kd(student_hidden=hidden, student_weight=head, teacher_hidden=hidden,
                       teacher_weight=head, targets=torch.zeros(20, dtype=torch.long))
    assert torch.isfinite(torch.stack(sums)).all()


# ---- copying ----
@pytest.mark.parametrize("name", ["response_rows", "cross_entropy", *DIVERGENCES, "token_kl"])
def test_a_function_works_when_it_is_pasted_into_an_empty_file(name):
    function, pasted = getattr(losses, name), {}
    exec("import torch\nimport torch.nn.functional as F\nfrom torch import Tensor\n"
         f"IGNORE_INDEX = {IGNORE_INDEX}", pasted)
    for part in (losses._log_probs, losses._mixture, function):
        if part is function or part.__name__ in inspect.getsource(function):  # what it calls
            exec(inspect.getsource(part), pasted)
    values = PAIR | dict(targets=TARGETS, logits=SEQUENCES[0], labels=LABELS)
    values.update(head_inputs() if name == "token_kl" else {})
    arguments = {x: values[x] for x in inspect.signature(function).parameters if x in values}
    torch.testing.assert_close(pasted[name](**arguments), function(**arguments), rtol=0, atol=0)
