"""What only a GPU can show; skipped where there is none: python -m pytest -q tests/test_gpu.py"""
import json
import math

import pytest
import torch
from conftest import hidden_rows, sound
from test_fused import error, exact, pair

import model as m
import train_kd
from losses import DIVERGENCES, fused_ce_kd

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DTYPES = [(torch.float32, 2e-5), (torch.bfloat16, 4e-3), (torch.float16, 2e-3)]


def on_gpu(rows, vocab, width, dtype, **options):
    inputs, weights = pair(rows, vocab, width, dtype, **options)
    return ({k: v.detach().cuda().requires_grad_(v.requires_grad) for k, v in inputs.items()}, weights.cuda())


@pytest.mark.parametrize("dtype, most", DTYPES)
@pytest.mark.parametrize("rows, vocab, width", [(37, 1000, 64), (700, 151_936, 128)])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_and_gradients_are_those_of_float64(kind, rows, vocab, width, dtype, most):
    inputs, weights = on_gpu(rows, vocab, width, dtype)
    options = dict(kind=kind, temperature=2.0, beta=0.3, ce_weight=1.0, kd_weight=0.5)
    loss, _, _ = fused_ce_kd(**inputs, row_weights=weights, **options)
    grads = torch.autograd.grad(loss, (inputs["student_hidden"], inputs["student_weight"]))
    expected = exact({k: v.detach() for k, v in inputs.items()}, row_weights=weights, **options)
    assert max(error(a, b) for a, b in zip((loss.detach(), *grads), expected)) < most


def test_the_gradient_of_a_thousandth_of_a_nat_survives_bf16():
    inputs, weights = on_gpu(64, 32_000, 256, torch.bfloat16, apart=0.03)
    options = dict(kind="forward_kl", temperature=1.0, beta=0.5, ce_weight=0.0, kd_weight=1.0)
    loss, _, _ = fused_ce_kd(**inputs, row_weights=weights, **options)
    grad, = torch.autograd.grad(loss, inputs["student_hidden"])
    expected = exact({k: v.detach() for k, v in inputs.items()}, row_weights=weights, **options)
    assert error(grad, expected[1]) < 4e-3


def test_the_loss_never_waits_for_the_gpu():
    inputs, weights = on_gpu(300, 5000, 64, torch.bfloat16)
    fused_ce_kd(**inputs, row_weights=weights)[0].backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_ce_kd(**inputs, row_weights=weights)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_peak_memory_is_a_chunk_and_not_all_logits():
    inputs, _ = on_gpu(4096, 50_000, 64, torch.bfloat16)
    inputs["student_weight"].requires_grad_(False)
    fused_ce_kd(**inputs)[0].backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_ce_kd(**inputs)[0].backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 4 * 256 * 50_000 * 4 + 2 * 4096 * 64 * 4, "more than four chunks of float32 logits"


@pytest.mark.parametrize("name", ["tiny", "real"])
def test_hidden_rows_and_answers_are_those_of_the_cpu(name, request):
    student = request.getfixturevalue(f"{name}_student")
    rows = [{"prompt": "What is the capital of France?"}, {"prompt": "Why do people like the music?"}]
    answers = ["Paris, of course!", "Nobody knows."]
    on_cpu = hidden_rows(student, rows, answers), student.generate(rows, max_new_tokens=12)
    try:
        student.cuda()
        for a, b in zip(on_cpu[0], hidden_rows(student, rows, answers)):
            torch.testing.assert_close(b.cpu(), a, rtol=1e-3, atol=1e-3)
        assert student.generate(rows, max_new_tokens=12) == on_cpu[1]
    finally:
        student.cpu()


def train(tiny, folder, *options):
    path = tiny.manifest(folder, 16)
    heldout = tiny.manifest(folder, 4, name="heldout", seed=1)
    train_kd.main(train_kd.get_args([
        "--teacher", tiny.llm, "--student", tiny.student_folder, "--data", str(path), "--eval-data", str(heldout),
        "--batch-size", "4", "--max-steps", "4", "--lr-warmup-steps", "0", *options, "--out", str(folder / "out")]))
    return [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options, most", [(["--dtype", "float32"], 2e-3), (["--dtype", "bfloat16"], 5e-2),
                                           (["--dtype", "bfloat16", "--gradient-checkpointing"], 5e-2)])
def test_training_has_the_losses_of_the_cpu(options, most, tiny, tmp_path):
    reference = train(tiny, tmp_path / "cpu", "--device", "cpu", "--dtype", "float32")
    log = train(tiny, tmp_path / "gpu", "--device", "cuda", *options)
    # by speech a rounding may change which words are heard
    assert len(log) == len(reference) == 6 and log[0]["eval_kl_t2t"] == pytest.approx(reference[0]["eval_kl_t2t"], rel=most, abs=1e-2)
    assert all(a["ce_t2t"] == pytest.approx(b["ce_t2t"], rel=most) for a, b in zip(log[1:5], reference[1:5]))
    assert all(math.isfinite(r["loss"]) for r in log if "loss" in r)


def test_a_clip_is_heard_as_on_the_cpu(real_student):
    clips = [sound(2.0, 1), sound(3.0, 2)]
    on_cpu = real_student.hear(clips)
    try:
        for a, b in zip(real_student.cuda().hear(clips), on_cpu):
            assert a.text == b.text
            torch.testing.assert_close(a.sound, b.sound, rtol=1e-2, atol=1e-2)
    finally:
        real_student.cpu()


def test_under_autocast_a_float32_head_gets_half_precision_products_and_a_float32_gradient():
    inputs, weights = on_gpu(70, 500, 64, torch.float32)
    options = dict(kind="forward_kl", temperature=2.0, beta=0.3, ce_weight=1.0, kd_weight=0.5)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, _, _ = fused_ce_kd(**inputs, row_weights=weights, **options)
    grads = torch.autograd.grad(loss, (inputs["student_hidden"], inputs["student_weight"]))
    rounded = {k: v.detach().bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = exact(rounded, row_weights=weights, **options)
    assert grads[1].dtype == torch.float32
    assert max(error(a, b) for a, b in zip((loss.detach(), *grads), expected)) < 4e-3


@pytest.mark.parametrize("chunk_rows", [64, 512, 2000])
def test_the_head_s_gradient_does_not_depend_on_the_chunks(chunk_rows):
    inputs, weights = on_gpu(1500, 300, 64, torch.bfloat16)
    options = dict(kind="forward_kl", temperature=2.0, beta=0.3, ce_weight=1.0, kd_weight=0.5)
    loss, _, _ = fused_ce_kd(**inputs, row_weights=weights, chunk_rows=chunk_rows, **options)
    grad, = torch.autograd.grad(loss, inputs["student_weight"])
    expected = exact({k: v.detach() for k, v in inputs.items()}, row_weights=weights, **options)
    assert error(grad, expected[2]) < 4e-3


def test_a_run_on_a_gpu_resumes(tiny, tmp_path):
    whole = train(tiny, tmp_path / "whole", "--save-every", "1")
    part = tmp_path / "part"
    with pytest.MonkeyPatch.context() as patch:
        saves = []
        save = train_kd.save_checkpoint

        def stop_after_the_third(*args, **options):
            save(*args, **options)
            saves.append(None)
            if len(saves) == 3:
                raise KeyboardInterrupt

        patch.setattr(train_kd, "save_checkpoint", stop_after_the_third)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, part, "--save-every", "1")
    resumed = train(tiny, part, "--save-every", "1", "--resume")
    a, b = ([r["loss"] for r in log if "loss" in r] for log in (whole, resumed))
    assert a == pytest.approx(b, rel=1e-5)
    load = [m.load_student(str(tmp_path / f / "out" / "last")).state_dict() for f in ("whole", "part")]
    for name, value in load[0].items():
        torch.testing.assert_close(load[1][name].float(), value.float(), rtol=1e-3, atol=1e-4)


def test_attention_under_a_mask_has_gradients_where_all_scores_are_far_below_zero():
    """cuDNN's backward gives nan where a length leaves 64 of 128 (pytorch#196678)."""
    m.start_processes("cuda")
    length, width = 192, 64
    q, k, v = (0.1 * torch.randn(1, 1, length, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q[..., 0], k[..., 0] = 1, -120 * math.sqrt(width)  # the softmax's log of sums is near -120
    causal = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()[None, None]
    q.requires_grad_()
    torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=causal).float().square().sum().backward()
    assert q.grad.isfinite().all()
