"""losses.fused_ce_kd against float64 autograd of the definitions, written here once more."""
import pytest
import torch

import losses
from losses import DIVERGENCES, fused_ce_kd


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair(rows, vocab, width, dtype=torch.float32, apart=1.0, seed=0):
    """Student and teacher whose hidden rows differ by `apart`; targets; row weights of CE, of KD."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, width, generator=g)
    teacher = student + apart * torch.randn(rows, width, generator=g)
    head = torch.randn(vocab, width, generator=g) * 2 / width**0.5
    inputs = {"student_hidden": student, "student_weight": head, "teacher_hidden": teacher,
              "teacher_weight": head.clone()}
    inputs = {k: v.to(dtype).requires_grad_(k.startswith("student")) for k, v in inputs.items()}
    inputs["targets"] = torch.randint(vocab, (rows,), generator=g)
    return inputs, torch.rand(rows, 2, generator=g)


def exact(inputs, kind, temperature, beta, ce_weight, kd_weight, row_weights, scales=(1.0, 1.0)):
    """Loss and gradients by float64 autograd on full logits."""
    student, head, teacher, teacher_head = (inputs[k].detach().double() for k in (
        "student_hidden", "student_weight", "teacher_hidden", "teacher_weight"))
    student.requires_grad_(), head.requires_grad_()
    vocab = min(len(head), len(teacher_head))
    logits = scales[0] * student @ head[:vocab].T
    p = (logits / temperature).softmax(-1)
    q = (scales[1] * teacher @ teacher_head[:vocab].T / temperature).softmax(-1)
    m = beta * q + (1 - beta) * p
    kd = {"forward_kl": q * (q / p).log(), "reverse_kl": p * (p / q).log(), "skew_kl": q * (q / m).log(),
          "jsd": beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()}[kind].sum(-1) * temperature**2
    ce = -logits.log_softmax(-1)[range(len(logits)), inputs["targets"]]
    loss = (row_weights.double() * torch.stack([ce_weight * ce, kd_weight * kd], 1)).sum()
    return loss.detach(), *torch.autograd.grad(loss, (student, head))


def error(value, expected):
    return float((value.double() - expected).norm() / expected.norm())


def errors(inputs, row_weights, chunk_rows=16, scales=(1.0, 1.0), **options):
    options = {"temperature": 2.0, "beta": 0.3, "ce_weight": 1.0, "kd_weight": 0.5, **options}
    loss, _, _ = fused_ce_kd(**inputs, row_weights=row_weights, chunk_rows=chunk_rows,
                             student_logit_scale=scales[0], teacher_logit_scale=scales[1], **options)
    grads = torch.autograd.grad(loss, (inputs["student_hidden"], inputs["student_weight"]))
    expected = exact(inputs, row_weights=row_weights, scales=scales, **options)
    return [error(a, b) for a, b in zip((loss.detach(), *grads), expected)]


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("rows, vocab, width", [(37, 11, 8), (33, 1000, 64), (9, 49_152, 96), (5, 152_064, 32)])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_and_gradients_are_those_of_float64(kind, rows, vocab, width, dtype, most):
    assert max(errors(*pair(rows, vocab, width, dtype), kind=kind)) < most


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_divergence_of_a_thousandth_of_a_nat_keeps_its_gradient(kind):
    inputs, weights = pair(33, 1000, 64, apart=0.03)
    assert max(errors(inputs, weights, kind=kind)) < 1e-5
    # alone, without the larger gradient of CE; the rounding of the logits themselves to float32 costs 1e-5 of it
    assert max(errors(inputs, weights, kind=kind, ce_weight=0.0, kd_weight=1.0)) < 5e-5


@pytest.mark.parametrize("options", [dict(temperature=1.0), dict(temperature=7.0), dict(ce_weight=0.0),
                                     dict(kd_weight=0.0), dict(chunk_rows=1), dict(chunk_rows=7),
                                     dict(scales=(0.25, 1.0)), dict(scales=(1.0, 3.0))])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_options_mean_what_they_say(kind, options):
    assert max(errors(*pair(37, 50, 16), kind=kind, **options)) < 1e-5


@pytest.mark.parametrize("needs_weight", [True, False])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradcheck_in_double(kind, needs_weight):
    inputs, weights = pair(5, 7, 4, torch.float64)
    inputs["student_weight"].requires_grad_(needs_weight)

    def loss(hidden, head):
        given = inputs | {"student_hidden": hidden, "student_weight": head}
        return fused_ce_kd(**given, kind=kind, beta=0.3, row_weights=weights, chunk_rows=2)[0]

    assert torch.autograd.gradcheck(loss, (inputs["student_hidden"], inputs["student_weight"]))


def test_a_half_precision_head_is_upcast_tile_by_tile(monkeypatch):
    inputs, weights = pair(9, 50, 16, torch.bfloat16)
    whole = fused_ce_kd(**inputs, row_weights=weights)
    monkeypatch.setattr(losses, "HALF_HEAD_TILE", 16)  # 16 + 16 + 16 + 2
    torch.testing.assert_close(fused_ce_kd(**inputs, row_weights=weights), whole, rtol=1e-6, atol=1e-6)
    assert max(errors(inputs, weights, kind="forward_kl")) < 4e-3


def test_blocks_of_rows_change_nothing(monkeypatch):
    inputs, weights = pair(21, 50, 16)
    whole = errors(inputs, weights, kind="jsd")
    monkeypatch.setattr(losses, "CPU_BLOCK_ROWS", 5)
    assert max(errors(inputs, weights, kind="jsd")) < 1e-5 and max(whole) < 1e-5


def test_overlap_is_the_share_of_the_students_64_likeliest_tokens_that_are_the_teachers():
    inputs, _ = pair(21, 500, 16, apart=0.3)
    inputs.pop("targets")
    overlap = losses.token_kl(**inputs, chunk_rows=8)[2]
    student, teacher = (inputs[f"{name}_hidden"] @ inputs[f"{name}_weight"].T for name in ("student", "teacher"))
    for share, ours, theirs in zip(overlap.tolist(), student.topk(64).indices.tolist(), teacher.topk(64).indices.tolist()):
        assert share == pytest.approx(len(set(ours) & set(theirs)) / 64)
    assert overlap.dtype == torch.float32 and 0.2 < overlap.mean() < 0.95
    same = inputs | {"teacher_hidden": inputs["student_hidden"]}
    assert (losses.token_kl(**same)[2] == 1).all()


def test_only_the_loss_carries_a_gradient_and_only_once():
    inputs, weights = pair(5, 7, 4)
    loss, ce_sum, kd_sum = fused_ce_kd(**inputs, ce_weight=0.3, kd_weight=2.0, row_weights=weights)
    assert loss.requires_grad and not ce_sum.requires_grad and not kd_sum.requires_grad
    torch.testing.assert_close(loss, 0.3 * ce_sum + 2.0 * kd_sum)
    scale = torch.tensor(3.0, requires_grad=True)
    first = torch.autograd.grad(loss * scale, inputs["student_hidden"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_without_gradients_nothing_is_kept():
    inputs, weights = pair(5, 7, 4)
    with torch.no_grad():
        values = fused_ce_kd(**inputs, row_weights=weights)
    assert not values[0].requires_grad
    torch.testing.assert_close(values, fused_ce_kd(**inputs, row_weights=weights))


def test_no_rows_give_zero_and_a_whole_graph():
    inputs, _ = pair(0, 7, 4)
    loss, ce_sum, kd_sum = fused_ce_kd(**inputs)
    loss.backward()
    assert loss.item() == ce_sum.item() == kd_sum.item() == 0
    assert inputs["student_hidden"].grad.shape == (0, 4) and not inputs["student_weight"].grad.any()


def test_tied_embeddings_get_both_gradients():
    torch.manual_seed(0)
    table, ids = torch.nn.Embedding(11, 6), torch.arange(9) % 11
    inputs, _ = pair(9, 11, 6)
    given = {k: v for k, v in inputs.items() if not k.startswith("student")}
    fused_ce_kd(student_hidden=table(ids), student_weight=table.weight, **given)[0].backward()
    tied, table.weight.grad = table.weight.grad, None
    logits, teacher = table(ids) @ table.weight.T, inputs["teacher_hidden"] @ inputs["teacher_weight"].T
    loss = losses.cross_entropy(student_logits=logits, targets=inputs["targets"]) + 0.5 * losses.forward_kl(
        student_logits=logits, teacher_logits=teacher, temperature=2.0)
    loss.backward()
    torch.testing.assert_close(tied, table.weight.grad, rtol=1e-5, atol=1e-5)


def test_no_logits_are_kept_for_the_backward_pass():
    shapes, (inputs, _) = [], pair(11, 7, 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape), lambda x: x):
        fused_ce_kd(**inputs, chunk_rows=4)
    assert shapes and not [shape for shape in shapes if shape[-1:] == (7,)]


def test_logits_of_a_chunk_are_the_largest_thing_in_memory():
    """The largest tensor that is made is chunk_rows x V, however many rows there are."""
    largest = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.append(max([x.numel() for x in torch.utils._pytree.tree_leaves(result)
                                if isinstance(x, torch.Tensor)], default=0))
            return result

    inputs, weights = pair(64, 500, 4)
    inputs["student_weight"].requires_grad_(False)
    with Largest():
        fused_ce_kd(**inputs, row_weights=weights, chunk_rows=8)[0].backward()
    assert max(largest) == 8 * 500


@pytest.mark.parametrize("wrong, found", [
    (dict(temperature=0), "temperature 0"), (dict(beta=1.0), "beta 1.0"), (dict(chunk_rows=0), "chunk_rows 0"),
    (dict(kind="kl"), "kind 'kl'"), (dict(targets=torch.tensor([0, 1, 2, 3, 7])), "index 7 is out of bounds .* size 7"),
    (dict(targets=torch.tensor([0, -100, 2, 3, 4])), "index -100 is out of bounds")])
def test_wrong_options_are_refused(wrong, found):
    inputs, _ = pair(5, 7, 4)
    with pytest.raises((ValueError, RuntimeError), match=found):
        fused_ce_kd(**{**inputs, **wrong})


@pytest.mark.parametrize("retain", [False, True])
def test_backward_scales_its_gradient_and_may_be_repeated_if_the_graph_is_kept(retain):
    inputs, _ = pair(9, 50, 16, torch.float32)
    hidden, weight = (inputs[k].requires_grad_() for k in ("student_hidden", "student_weight"))
    plain = torch.autograd.grad(losses.fused_ce_kd(**inputs)[0], (hidden, weight))
    loss = losses.fused_ce_kd(**inputs)[0]
    for factor in (3.0, 0.5)[:1 + retain]:
        scaled = torch.autograd.grad(loss * factor, (hidden, weight), retain_graph=retain)
        for a, b in zip(scaled, plain):
            torch.testing.assert_close(a, b * factor)


def test_autocast_on_a_cpu_rounds_factors_only_and_leaves_the_precision_of_others_alone():
    inputs, weights = pair(9, 50, 16, torch.float32)
    before = torch.backends.mkldnn.fp32_precision, torch.get_float32_matmul_precision()
    with torch.autocast("cpu", torch.bfloat16):
        assert max(errors(inputs, weights, kind="forward_kl")) < 4e-3
    assert (torch.backends.mkldnn.fp32_precision, torch.get_float32_matmul_precision()) == before


def test_token_kl_is_the_same_under_autocast():
    inputs, _ = pair(9, 50, 16, torch.float32)
    arguments = {key: inputs[key] for key in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")}
    expected = losses.token_kl(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.token_kl(**arguments)
    assert expected[0].dtype == torch.float32 and all(map(torch.equal, found, expected))


def test_a_divergence_without_a_gradient_of_its_own_is_no_other_one(monkeypatch):
    monkeypatch.setitem(DIVERGENCES, "mine", losses.forward_kl)
    with pytest.raises(UnboundLocalError):
        fused_ce_kd(**pair(3, 20, 8)[0], kind="mine")
