"""
Every loss of cross-modal knowledge distillation, as plain functions: tensors in, a float32 sum out.

Copy one function, or the file: it imports torch only. All losses take rows, one for each supervised
token, and return SUMS; divide once, in the training loop, by the number of tokens over all GPUs and
micro-batches. The plain losses take logits; fused_ce_kd, which train_kd.py calls, hidden rows.
"""
import functools
import importlib.util
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def response_rows(logits: Tensor, labels: Tensor):
    """Select the rows that predict supervised tokens: the causal shift, done once and only here.

    Logits (B, T, V), labels (B, T) int64, unshifted: labels[b, t] is the token AT t or IGNORE_INDEX
    -> rows (N, V), targets (N,): row n is what the model gives for targets[n].
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"(B, T) of logits {tuple(logits.shape)}, labels {tuple(labels.shape)}")
    targets = labels[:, 1:]            # position t is predicted from t-1
    keep = targets != IGNORE_INDEX     # (B, T-1), 1 = the loss sees it
    return logits[:, :-1][keep], targets[keep]  # selected: a mask's 0 * inf would be NaN


def cross_entropy(*, student_logits: Tensor, targets: Tensor):
    """Sum over rows of -log p_student(target), targets (N,) int64; the rest as in forward_kl."""
    return F.cross_entropy(student_logits.float(), targets, reduction="sum")


def _log_probs(student_logits, teacher_logits, temperature):
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student rows {tuple(student_logits.shape)} "
                         f"!= teacher rows {tuple(teacher_logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected > 0")
    # float32 first: a KL is a small difference of logarithms, and bfloat16 has 8 bits
    return [F.log_softmax(x.float() / temperature, -1) for x in (student_logits, teacher_logits)]


def _mixture(log_student, log_teacher, beta):
    """log(beta * teacher + (1 - beta) * student), in log space: nothing underflows."""
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}, expected 0 < beta < 1")
    import math  # here, so that the function can be pasted
    return torch.logaddexp(log_teacher + math.log(beta), log_student + math.log(1 - beta))


def forward_kl(*, student_logits: Tensor, teacher_logits: Tensor, temperature=1.0):
    """Sum over rows of KL(teacher || student), times T^2. Mode-covering; the method's loss.

    Args:
        student_logits: (N, V) float, any dtype; one row per supervised token. Gradient flows.
        teacher_logits: (N, V) float, same V and token order. Compute it under no_grad.
        temperature: T > 0 divides both logits. T^2 keeps the gradient's size comparable across T.
    Returns:
        () float32, in nats x tokens; exactly 0 for N = 0. Logits must be finite: 0 * inf is NaN.
    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2.
    """
    log_student, log_teacher = _log_probs(student_logits, teacher_logits, temperature)  # (N, V)
    # DIFFERS: the method's paper (arXiv:2509.14930) leaves the direction open; forward is inferred
    return (log_teacher.exp() * (log_teacher - log_student)).sum() * temperature**2


def reverse_kl(*, student_logits: Tensor, teacher_logits: Tensor, temperature=1.0):
    """Sum over rows of KL(student || teacher), times T^2. Mode-seeking. Arguments as in forward_kl.
    Source: Gu et al. 2023, MiniLLM (arXiv:2306.08543), section 2."""
    log_student, log_teacher = _log_probs(student_logits, teacher_logits, temperature)
    return (log_student.exp() * (log_student - log_teacher)).sum() * temperature**2


def jsd(*, student_logits: Tensor, teacher_logits: Tensor, temperature=1.0, beta=0.5):
    """Sum over rows of beta * KL(teacher || m) + (1 - beta) * KL(student || m), times T^2, with
    m = beta * teacher + (1 - beta) * student, 0 < beta < 1. Other arguments as in forward_kl.
    Source: Agarwal et al. 2023, GKD (arXiv:2306.13649), equation 1."""
    log_student, log_teacher = _log_probs(student_logits, teacher_logits, temperature)
    log_mixture = _mixture(log_student, log_teacher, beta)  # (N, V)
    teacher_term = (log_teacher.exp() * (log_teacher - log_mixture)).sum()
    student_term = (log_student.exp() * (log_student - log_mixture)).sum()
    return (beta * teacher_term + (1 - beta) * student_term) * temperature**2


def skew_kl(*, student_logits: Tensor, teacher_logits: Tensor, temperature=1.0, beta=0.1):
    """Sum over rows of KL(teacher || m), times T^2, with m and the arguments as in jsd.
    Source: Ko et al. 2024, DistiLLM (arXiv:2402.03898), equation 3."""
    log_student, log_teacher = _log_probs(student_logits, teacher_logits, temperature)
    log_mixture = _mixture(log_student, log_teacher, beta)
    # teacher / m <= 1 / beta: the gradient is bounded, also where the student gives a token nothing
    return (log_teacher.exp() * (log_teacher - log_mixture)).sum() * temperature**2


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "skew_kl": skew_kl}


def token_kl(*, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor,
             teacher_weight: Tensor, student_logit_scale=1.0, teacher_logit_scale=1.0,
             chunk_rows=64):
    """Of each token, (N,): KL(teacher || student) in nats at temperature 1; do both prefer the same
    token; share of the student's 64 likeliest among the teacher's. Arguments: see fused_ce_kd."""
    vocab = min(len(student_weight), len(teacher_weight))
    student_weight, teacher_weight = student_weight[:vocab].float(), teacher_weight[:vocab].float()
    parts, exact = [], torch.autocast(student_hidden.device.type, enabled=False)
    for student, teacher in zip(student_hidden.split(chunk_rows), teacher_hidden.split(chunk_rows)):
        with exact:  # a KL is a small difference of logarithms
            log_student = (student_logit_scale * student.float() @ student_weight.T).log_softmax(-1)
            log_teacher = (teacher_logit_scale * teacher.float() @ teacher_weight.T).log_softmax(-1)
        kl = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)            # (n,)
        agree = log_teacher.argmax(-1) == log_student.argmax(-1)
        ours, theirs = (x.topk(min(64, vocab)).indices for x in (log_student, log_teacher))
        overlap = (ours[:, :, None] == theirs[:, None]).any(-1).float().mean(-1)  # of (n, 64, 64)
        parts.append((kl.cpu(), agree.cpu(), overlap.cpu()))
    return tuple(map(torch.cat, zip(*parts)))


# ---- the fused loss: a chunk of rows at a time, its gradient with it; no (N, V) tensor exists ----
HALF = {torch.bfloat16, torch.float16}
CPU_BLOCK_ROWS = 4      # rows whose point-wise work is done together on a CPU: in its cache
HALF_HEAD_TILE = 2048   # tokens of a half-precision head that are upcast together on a CPU
GPU_WEIGHT_ROWS = 1024  # rows that are summed in one product for a trainable head on a GPU
Options = namedtuple("Options", "kind temperature beta ce_weight kd_weight")  # of fused_ce_kd


def _divergence(options, log_student, log_teacher, student, teacher):
    """Rows (n, V) -> KD (n,) and its gradient (n, V), both but for factors of T."""
    # beside each KL(p || q) stands sum(q - p) = 0: rounded normalisers have no first-order effect
    if options.kind == "forward_kl":  # the method's: in place
        gradient = student.sub_(teacher)
        return log_teacher.sub_(log_student).mul_(teacher).sum(-1) + gradient.sum(-1), gradient
    if options.kind == "reverse_kl":
        slope = log_student - log_teacher  # derivative by the probabilities, up to a constant
        kd = (student * slope).sum(-1) + (teacher - student).sum(-1)
    elif options.kind in ("jsd", "skew_kl"):  # another one fails below: it needs its gradient here
        beta, log_mixture = options.beta, _mixture(log_student, log_teacher, options.beta)
        mixture = log_mixture.exp()
        kd = (teacher * (log_teacher - log_mixture)).sum(-1) + (mixture - teacher).sum(-1)
        slope = (beta - 1) * (log_teacher - log_mixture).exp()
    if options.kind == "jsd":
        slope = (1 - beta) * (log_student - log_mixture)
        kd = beta * kd + (student * slope).sum(-1) + (1 - beta) * (mixture - student).sum(-1)
    return kd, student * (slope - (student * slope).sum(-1, keepdim=True))  # through softmax


def _ce_kd_rows(logits, rows, options, dtype, space=(None,) * 4):
    """Both models' logits (n, V); the rows' targets, weights of CE, of KD (n,) -> sums (2,) of CE
    and KD, and the gradient (n, V) of ce_weight * CE + kd_weight * KD by the student's logits."""
    (targets, of_ce, of_kd), temperature = rows, options.temperature
    a, b, c, d = space  # (n, V) each: a CPU writes there, where it would map memory for each block
    log_student, log_teacher = (
        torch.log_softmax(x if temperature == 1 else torch.div(x, temperature, out=c), -1, out=y)
        for x, y in zip(logits, (a, b)))
    student, teacher = torch.exp(log_student, out=c), torch.exp(log_teacher, out=d)
    kd, gradient = _divergence(options, log_student, log_teacher, student, teacher)
    gradient *= (options.kd_weight * temperature * of_kd)[:, None]  # T^2 of the loss / T
    log_probs = log_student if temperature == 1 else torch.log_softmax(logits[0], -1, out=a)
    ce = -log_probs.gather(-1, targets[:, None])[:, 0]  # (n,)
    if options.ce_weight:  # its gradient: probabilities minus one-hot targets
        scale = (options.ce_weight * of_ce)[:, None]
        gradient += torch.exp(log_probs, out=b).mul_(scale)
        if targets.is_cuda:  # compiled, this costs no pass of its own; a scatter would
            vocab = torch.arange(gradient.shape[1], device=targets.device)
            gradient -= torch.where(vocab == targets[:, None], scale, 0.0)
        else:
            gradient.scatter_add_(-1, targets[:, None], -scale)
    sums = torch.stack([of_ce @ ce, of_kd @ kd * temperature**2])
    return sums, gradient.to(dtype)  # compiled, rounding costs no pass either


@functools.cache
def _compiled():
    # a row is as long as the vocabulary: one program a row reads it twice, split rows are read more
    return torch.compile(_ce_kd_rows, dynamic=True, options={"split_reductions": False},
                         disable=not importlib.util.find_spec("triton"))


def _point_wise(logits, rows, options, dtype):
    """_ce_kd_rows: compiled, or in blocks, whose gradient takes the place of student's logits."""
    if rows[0].is_cuda:
        return _compiled()(logits, rows, options, dtype)
    sums, space = 0, [torch.empty_like(logits[0][:CPU_BLOCK_ROWS]) for _ in range(4)]
    for start in range(0, len(rows[0]), CPU_BLOCK_ROWS):
        student, teacher, *some = (x[start:start + CPU_BLOCK_ROWS] for x in (*logits, *rows))
        values, gradient = _ce_kd_rows((student, teacher), some, options, student.dtype,
                                       [x[:len(student)] for x in space])
        student.copy_(gradient)
        sums += values.double()
    return sums, logits[0]


def _addmm(out, a, b, factors, beta=1):
    """out = beta * out + a @ b in out's float32 or float64: a and b are rounded to `factors` where
    that makes it quicker, the result never."""
    if b.is_cuda and factors in HALF:
        torch.addmm(out, a.to(factors), b.to(factors), out_dtype=torch.float32, beta=beta, out=out)
    elif factors == torch.bfloat16:  # oneDNN rounds them on its way, if the processor has bfloat16
        with torch.backends.mkldnn.flags(None, None, None, fp32_precision="bf16"):
            out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)


class _FusedCeKd(torch.autograd.Function):
    """The gradients are made in forward, where the logits are; backward only scales them."""

    @staticmethod
    def forward(ctx, student_hidden, student_weight, teacher, rows, options):
        """teacher: hidden rows, head. rows: see _ce_kd_rows. options: also half, chunk_rows."""
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        (options, half, chunk_rows), num_rows, on_cpu = options, len(rows[0]), not rows[0].is_cuda
        hiddens, heads = (student_hidden, teacher[0]), [student_weight, teacher[1]]
        vocab, wide = min(map(len, heads)), rows[1]  # of the dtype that all sums have
        for i, head in enumerate(heads):  # a GPU rounds them once, for all chunks
            heads[i] = head[:vocab] if on_cpu else head[:vocab].to(half or head.dtype)
        tile = HALF_HEAD_TILE if on_cpu and HALF & {head.dtype for head in heads} else vocab
        logits = [wide.new_empty(min(chunk_rows, num_rows), vocab) for _ in heads]
        grad_hidden = wide.new_zeros(student_hidden.shape) if needs_hidden else None
        grad_weight = wide.new_zeros(student_weight.shape) if needs_weight else None
        pending, together = [], 1 if on_cpu else max(1, GPU_WEIGHT_ROWS // chunk_rows)
        sums = wide.new_zeros(2, dtype=torch.float64)  # CE, KD
        for start in range(0, num_rows, chunk_rows):
            stop = min(start + chunk_rows, num_rows)
            logits = [x[:stop - start] for x in logits]  # 2 x (n, V)
            for out, hidden, head in zip(logits, hiddens, heads):
                for part, tokens in zip(out.split(tile, 1), head.split(tile)):
                    _addmm(part, hidden[start:stop], tokens.T, half or head.dtype, beta=0)
            some = [x[start:stop] for x in rows]
            values, gradient = _point_wise(logits, some, options, heads[0].dtype)  # (n, V)
            sums += values
            if stop == num_rows:  # the teacher's logits make room for a gradient
                logits = out = part = None
            if needs_hidden:
                for part, tokens in zip(gradient.split(tile, 1), heads[0].split(tile)):
                    _addmm(grad_hidden[start:stop], part, tokens, half or tokens.dtype)  # (n, H)
            if needs_weight:  # a GPU reads and writes this gradient as seldom as memory allows
                pending.append(gradient)
                if len(pending) == together or stop == num_rows:
                    gradient = torch.cat(pending) if len(pending) > 1 else gradient
                    first, pending = stop - len(gradient), []
                    _addmm(grad_weight[:vocab], gradient.T, student_hidden[first:stop],
                           half or heads[0].dtype, beta=int(first > 0))  # (V, H)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = student_hidden.dtype, student_weight.dtype
        ce_sum, kd_sum = sums.to(wide.dtype).unbind()
        ctx.mark_non_differentiable(ce_sum, kd_sum)
        return options.ce_weight * ce_sum + options.kd_weight * kd_sum, ce_sum, kd_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _ce, _kd):
        retained, grads = torch._C._autograd._get_current_graph_task_keep_graph(), []
        for grad, to in zip(ctx.saved_tensors, ctx.dtypes):
            if grad is not None:  # in place, unless retain_graph: no second float32 copy
                out = torch.empty_like(grad, dtype=to) if retained or grad.dtype != to else grad
                grad = torch.mul(grad, grad_loss, out=out)
            grads.append(grad)
        return *grads, None, None, None


def fused_ce_kd(*, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor,
                teacher_weight: Tensor, targets: Tensor, kind="forward_kl", temperature=2.0,
                beta=0.5, ce_weight=1.0, kd_weight=0.5, row_weights=None, chunk_rows=256,
                student_logit_scale=1.0, teacher_logit_scale=1.0):
    """Output heads, losses and their gradient together, a chunk of rows at a time.

    Args:
        student_hidden: (N, H) answer rows of the student before its output head. Gradient flows.
        student_weight: (V, H) its head; gets a gradient, summed in float32, if it requires one.
        teacher_hidden, teacher_weight: (N, H'), (V', H') of the teacher. No gradient. The larger
            vocabulary is cut: models pad theirs differently.
        targets: (N,) int64 answer tokens. row_weights: (N, 2) of their CE, of their KD; None = 1.
        kind: one of DIVERGENCES; beta is for jsd and skew_kl only.
        chunk_rows: rows whose two (rows, V) float32 logits exist at the same time.
        student_logit_scale, teacher_logit_scale: logits = scale * hidden @ weight.T.
    Returns:
        loss = ce_weight * ce_sum + kd_weight * kd_sum, which alone carries a gradient, but no
        second one; ce_sum and kd_sum for the log, row weights and T^2 included; () float32.
        Half precision, of inputs or autocast, rounds factors of products, never logits.
    """
    if not len(student_hidden) == len(teacher_hidden) == len(targets):
        raise ValueError(f"rows of student {len(student_hidden)}, teacher {len(teacher_hidden)}, "
                         f"targets {len(targets)}; expected the same answer ids on both sides")
    if kind not in DIVERGENCES or not temperature > 0 or chunk_rows < 1 or not 0 < beta < 1:
        raise ValueError(f"kind {kind!r}, temperature {temperature}, beta {beta}, chunk_rows "
                         f"{chunk_rows}; expected {'|'.join(DIVERGENCES)}, > 0, 0 < beta < 1, >= 1")
    device, wide = targets.device.type, torch.promote_types(student_hidden.dtype, torch.float32)
    half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    row_weights = targets.new_ones(len(targets), 2) if row_weights is None else row_weights
    if not torch.is_grad_enabled():  # ctx.needs_input_grad does not look at this
        student_hidden, student_weight = student_hidden.detach(), student_weight.detach()
    with torch.autocast(device, enabled=False):
        return _FusedCeKd.apply(  # a scale of logits may as well be one of the fewer hidden numbers
            student_hidden * student_logit_scale, student_weight,
            (teacher_hidden.detach() * teacher_logit_scale, teacher_weight.detach()),
            (targets, *row_weights.to(wide).T.contiguous()),  # each in one piece
            (Options(kind, temperature, beta, ce_weight, kd_weight), half, chunk_rows))
