"""
Every loss of cross-modal knowledge distillation, as plain functions: tensors in, a float32 sum out.

Copy one function, or the file: it imports torch only. All losses take rows, one for each supervised token, and return
SUMS; divide once, in the training loop, by the number of tokens over all GPUs and micro-batches. Student comes before
teacher, and everything is passed by keyword. `ce_kd` is the one place through which train_kd.py calls the others.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100


def response_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Select the rows that predict supervised tokens: the causal shift, done once and only here.

    Args:
        logits: (B, T, V).
        labels: (B, T) int64, unshifted: labels[b, t] is the token AT t, or IGNORE_INDEX.
    Returns:
        rows (N, V) and targets (N,). Row n is the distribution that the model gives for targets[n].
    Raises:
        ValueError: if the two disagree on (B, T).
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} disagree on (B, T)")
    targets = labels[:, 1:]            # position t is predicted from t-1
    keep = targets != IGNORE_INDEX     # (B, T-1), 1 = the loss sees it
    return logits[:, :-1][keep], targets[keep]


def cross_entropy(*, student_logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of -log p_student(target).

    Args:
        student_logits: (N, V) float, any dtype. Gradient flows.
        targets: (N,) int64 in [0, V).
    Returns:
        () float32, in nats x tokens; exactly 0 for N = 0.
    Raises:
        ValueError: if the lengths differ.
    """
    if student_logits.shape[:1] != targets.shape:
        raise ValueError(f"student rows {tuple(student_logits.shape)} and targets {tuple(targets.shape)} disagree on N")
    return F.cross_entropy(student_logits.float(), targets, reduction="sum")


def _log_probs(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student rows {tuple(student_logits.shape)} != teacher rows {tuple(teacher_logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected > 0")
    return (F.log_softmax(student_logits.float() / temperature, dim=-1),
            F.log_softmax(teacher_logits.float() / temperature, dim=-1))


def _mixture(log_student: Tensor, log_teacher: Tensor, beta: float) -> Tensor:
    """log(beta * teacher + (1 - beta) * student), in log space."""
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}, expected 0 < beta < 1")
    log_beta = torch.tensor([beta, 1 - beta], dtype=torch.float64).log().tolist()
    return torch.logaddexp(log_teacher + log_beta[0], log_student + log_beta[1])


def forward_kl(*, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over rows of KL(teacher || student), times T^2. Mode-covering; the method's loss.

    Args:
        student_logits: (N, V) float, any dtype; one row per supervised token. Gradient flows.
        teacher_logits: (N, V) float, same V and token order. Compute it under no_grad.
        temperature: T > 0 divides both logits. T^2 keeps the size of the gradient comparable across T.
    Returns:
        () float32, in nats x tokens; exactly 0 for N = 0.
    Raises:
        ValueError: if the shapes differ, or T is not positive. Logits must be finite: 0 * inf is NaN.
    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2.
    """
    log_student, log_teacher = _log_probs(student_logits, teacher_logits, temperature)
    return (log_teacher.exp() * (log_teacher - log_student)).sum() * temperature**2


def reverse_kl(*, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over rows of KL(student || teacher), times T^2. Mode-seeking. Arguments as in forward_kl.

    Source: Gu et al. 2023, MiniLLM (arXiv:2306.08543), section 2.
    """
    log_student, log_teacher = _log_probs(student_logits, teacher_logits, temperature)
    return (log_student.exp() * (log_student - log_teacher)).sum() * temperature**2


def jsd(*, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """Sum over rows of beta * KL(teacher || m) + (1 - beta) * KL(student || m), times T^2.

    m = beta * teacher + (1 - beta) * student with 0 < beta < 1; other arguments as in forward_kl.

    Source: Agarwal et al. 2023, GKD (arXiv:2306.13649), equation 1.
    """
    log_student, log_teacher = _log_probs(student_logits, teacher_logits, temperature)
    log_mixture = _mixture(log_student, log_teacher, beta)
    teacher_term = (log_teacher.exp() * (log_teacher - log_mixture)).sum()
    student_term = (log_student.exp() * (log_student - log_mixture)).sum()
    return (beta * teacher_term + (1 - beta) * student_term) * temperature**2


def skew_kl(*, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 0.1) -> Tensor:
    """Sum over rows of KL(teacher || beta * teacher + (1 - beta) * student), times T^2; 0 < beta < 1.

    Bounded gradients where the student gives a teacher token almost no probability. Arguments as in forward_kl.

    Source: Ko et al. 2024, DistiLLM (arXiv:2402.03898), equation 3.
    """
    log_student, log_teacher = _log_probs(student_logits, teacher_logits, temperature)
    log_mixture = _mixture(log_student, log_teacher, beta)
    return (log_teacher.exp() * (log_teacher - log_mixture)).sum() * temperature**2


def ctc(*, student_logits: Tensor, lengths: Tensor, targets: list[list[int]]) -> Tensor:
    """Sum over clips of -log p(spelling | clip), over all alignments. Class 0 is the blank.

    Args:
        student_logits: (B, A, C) float; lengths: (B,) real frames of each clip.
        targets: B lists of classes in [1, C). A clip too short for its targets adds 0.
    Returns:
        () float32, in nats x target tokens.
    Raises:
        ValueError: if a class is no class, or the number of clips differs.
    Source: Graves et al. 2006, Connectionist Temporal Classification.
    """
    flat = torch.tensor([c for clip in targets for c in clip], dtype=torch.long)
    low, high = (int(flat.min()), int(flat.max())) if len(flat) else (1, 1)
    if len(targets) != len(student_logits) or not 0 < low <= high < student_logits.shape[2]:
        raise ValueError(f"logits {tuple(student_logits.shape)} and targets of {len(targets)} clips with classes {low} to "
                         f"{high} disagree; expected one list a clip and 0 < class < C")
    log_probs = F.log_softmax(student_logits.float(), dim=-1).transpose(0, 1)        # (A, B, C)
    target_lengths = torch.tensor([len(clip) for clip in targets], dtype=torch.long, device=student_logits.device)
    flat = flat.to(student_logits.device)
    return F.ctc_loss(log_probs, flat, lengths, target_lengths, reduction="sum", zero_infinity=True)


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "skew_kl": skew_kl}


def ce_kd(*, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
          targets: Tensor, kind: str = "forward_kl", temperature: float = 2.0, beta: float = 0.5,
          ce_weight: float = 1.0, kd_weight: float = 0.5, chunk_rows: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Output heads and losses together, a chunk of rows at a time, so that no (N, V) tensor outlives its chunk.

    Args:
        student_hidden: (N, H) answer rows of the student before its output head. Gradient flows.
        student_weight: (V, H) its head; gets a gradient if it requires one.
        teacher_hidden, teacher_weight: (N, H'), (V', H') of the teacher. No gradient.
        targets: (N,) int64 answer tokens.
        kind: one of DIVERGENCES; beta is for jsd and skew_kl only.
        chunk_rows: rows whose logits exist at the same time; they are formed again in the backward pass.
    Returns:
        loss = ce_weight * ce_sum + kd_weight * kd_sum, and the detached ce_sum and kd_sum (T^2 included); () float32.
        Both vocabularies are cut to the smaller one, since models pad them differently.
    Raises:
        ValueError: if a target is negative or beyond the common vocabulary, or the numbers of rows differ.
    """
    if not len(student_hidden) == len(teacher_hidden) == len(targets):
        raise ValueError(f"rows differ: student {len(student_hidden)}, teacher {len(teacher_hidden)}, "
                         f"targets {len(targets)}; same answer ids on both sides?")
    if kind not in DIVERGENCES:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(DIVERGENCES)}")
    vocab = min(len(student_weight), len(teacher_weight))
    low, high = (int(targets.min()), int(targets.max())) if len(targets) else (0, 0)
    if not 0 <= low <= high < vocab:
        raise ValueError(f"targets {low} to {high} lie beyond the common vocabulary of {vocab} tokens")
    student_weight, teacher_weight = student_weight[:vocab], teacher_weight[:vocab].detach()
    options = dict(temperature=temperature, **({"beta": beta} if kind in ("jsd", "skew_kl") else {}))

    def chunk(student_rows, teacher_rows, chunk_targets):
        with torch.autocast(student_rows.device.type, enabled=False):  # bf16 logits would ruin a small KL's gradient
            student_logits = student_rows.float() @ student_weight.float().T        # (n, V)
            with torch.no_grad():
                teacher_logits = teacher_rows.float() @ teacher_weight.float().T    # (n, V)
            return (cross_entropy(student_logits=student_logits, targets=chunk_targets),
                    DIVERGENCES[kind](student_logits=student_logits, teacher_logits=teacher_logits, **options))

    ce_sum = kd_sum = torch.zeros((), device=student_hidden.device)  # N = 0 gives one empty chunk: the graph is whole
    for rows in zip(*(x.split(chunk_rows) for x in (student_hidden, teacher_hidden.detach(), targets))):
        ce, kd = checkpoint(chunk, *rows, use_reentrant=False)
        ce_sum, kd_sum = ce_sum + ce, kd_sum + kd
    return ce_weight * ce_sum + kd_weight * kd_sum, ce_sum.detach(), kd_sum.detach()
