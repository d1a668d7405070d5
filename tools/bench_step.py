"""
The training step against others': same rows, answer ids, models, dtype, threads and optimizer (AdamW), in one run.

Ours is train_kd.main itself, watched at the end of each step; what Whisper heard is known before, here and in the plain
loop. Rivals:
  plain loop   both channels with full (B, T, V) logits of teacher and student, padded rows, no shared prefix; the same
               student, as Ultravox trains (ultravox_model.py:_compute_kl_loss, 648efe7)
  TRL GKD      trl.experimental.gkd, lmbda=0; by text alone, it has no speech
Each runs in a process of its own. After WARM_UP steps they are timed, in turns on a CPU: a step of each, then the next
of each. Memory: the highest of a step above what stays between steps (weights, optimizer). Called by bench.py.
"""
import contextlib
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import bench_lib as lib
import model as m
import train_kd

WARM_UP = 2  # steps until the allocator is at rest
CHECKPOINTING = "ours, --gradient-checkpointing"
SETTINGS = {"text and speech": ["plain loop", "ours", CHECKPOINTING], "text": ["plain loop", "TRL GKD", "ours", CHECKPOINTING]}


class Stop(Exception):
    """Enough steps."""


class Watch:
    """Clock and memory of a run; `end_of_step` is called at the end of each optimizer step."""

    def __init__(self, device, steps, in_turns):
        self.device, self.steps, self.in_turns = device, steps, in_turns
        self.done, self.seconds, self.norms, self.rest, self.peak, self.last = 0, [], [], 0, 0, 0.0

    def end_of_step(self, norms=None):
        """Raises: Stop after the last step that is wanted."""
        spent = lib.now(self.device) - self.last
        self.done += 1
        self.norms.append(norms)
        if self.done > WARM_UP:
            self.seconds.append(spent)
            self.peak = lib.peak_bytes(self.device)
        else:
            self.rest = lib.rest_bytes(self.device)
        if len(self.seconds) == self.steps:
            raise Stop
        if self.in_turns:
            lib.take_turn()
        self.last = lib.now(self.device)


def options_of(job):
    """Arguments of train_kd.py that all share."""
    parts, channels = (["llm"], ["t2t"]) if job["setting"] == "text" else (["adapter", "llm"], ["t2t", "s2t"])
    more = ["--gradient-checkpointing"] if job["rival"] == CHECKPOINTING else []
    return train_kd.get_args([
        "--teacher", job["llm"], "--student", f"{job['whisper']}+{job['llm']}", "--data", job["data"], "--out", job["out"],
        "--cache", job["cache"], "--channels", *channels, "--train", *parts, "--ce-weight", "0", "--kd-weight", "1",
        "--temperature", "1", "--batch-size", str(job["batch_size"]), "--max-answer-tokens", str(job["answer_tokens"]),
        "--max-steps", str(WARM_UP + job["steps"] + 1), "--save-every", "1000000", "--dtype", job["dtype"],
        "--device", job["device"], *more])


def ours(job, watch):
    """train_kd.main, as it is."""
    update = train_kd.update
    train_kd.update = lambda *args: watch.end_of_step(update(*args)) or {}  # the log's norms
    train_kd.main(options_of(job))


def prepare(args):
    """-> student, teacher, tokenizer, and the items of each step in train_kd's order."""
    dtype, device = getattr(torch, args.dtype), args.device
    student = m.load_student(args.student)
    if isinstance(student, m.SpeechLLM):
        student.adapter.listens.fill_(True)  # as train_kd.main does
    teacher, tokenizer = m.load_llm(args.teacher, dtype)
    train_kd.choose_what_trains(args, student, dtype)
    student.to(device)
    teacher.to(device).requires_grad_(False)
    rows = train_kd.read_manifest(args.data[0], {})
    heard_of = train_kd.hear_all(args, student, rows)

    def item_of(k):
        return train_kd.make_item(rows[k], args, student, tokenizer, heard_of)

    plan = train_kd.plan_steps(rows, args)
    return student.train(), teacher, tokenizer, (list(map(item_of, step[0])) for step in plan)


def padded(rows):
    """Rows (T_i, ...) -> (B, T, ...), attention mask (B, T)."""
    ones = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
    return [torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (rows, ones)]


def predict(logits, rows, answers):  # (B, T, V) -> (N, V)
    return torch.cat([x[len(row) - len(answer) - 1:len(row) - 1] for x, row, answer in zip(logits, rows, answers)])


def plain_loop(job, watch):
    args = options_of(job)
    student, teacher, _, steps = prepare(args)
    optimizer = train_kd.make_optimizer(args, student)
    for items in steps:
        answers = [item["answer"] for item in items]
        for channel in args.channels:
            with torch.no_grad():
                rows = [torch.tensor(item["teacher_ids"] + item["answer"], device=args.device) for item in items]
                ids, mask = padded(rows)
                taught = predict(teacher(input_ids=ids, attention_mask=mask).logits, rows, answers)
            with torch.autocast(args.device, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
                rows = student.embed([item[channel] for item in items], answers)
                embeds, mask = padded(rows)
                learned = predict(student.llm(inputs_embeds=embeds, attention_mask=mask).logits, rows, answers)
                loss = F.kl_div(learned.log_softmax(-1), taught.softmax(-1), reduction="batchmean")
            loss.backward()
        watch.end_of_step(train_kd.update(args, optimizer, f"step {watch.done + 1}"))


def trl_gkd(job, watch):
    import datasets
    from transformers import TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    args = options_of(job)
    _, teacher, tokenizer, steps = prepare(args)
    student, _ = m.load_llm(job["llm"])
    rows = [{"prompt": "", "input_ids": item["teacher_ids"] + item["answer"],
             "completion_mask": [0] * len(item["teacher_ids"]) + [1] * len(item["answer"])} for items in steps for item in items]
    tokenizer.padding_side = "left"

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *_, **__):
            watch.end_of_step()

    config = GKDConfig(
        output_dir=job["out"], per_device_train_batch_size=job["batch_size"], max_steps=args.max_steps, lmbda=0.0, beta=0.0,
        bf16=job["dtype"] == "bfloat16", gradient_checkpointing=False, learning_rate=2e-5, max_grad_norm=1.0,
        use_cpu=job["device"] == "cpu", save_strategy="no", report_to=[], disable_tqdm=True, dataloader_num_workers=1)
    trainer = GKDTrainer(student, teacher, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    trainer.add_callback(EndOfStep())
    trainer.train()


RUNS = {"plain loop": plain_loop, "TRL GKD": trl_gkd}


def run(in_turns=False, **job):
    """One process's job -> what its Watch saw."""
    watch = Watch(job["device"], job["steps"], in_turns)
    try:
        RUNS.get(job["rival"], ours)(job, watch)
    except Stop:
        pass
    return {"seconds": watch.seconds, "above_bytes": watch.peak - watch.rest, "norms": watch.norms}


def run_in_turns(jobs, out):
    """{rival: job} -> {rival: answer of `run`}; all take their first step, then all their second, ..."""
    with contextlib.ExitStack() as stack:  # None: it has taken a step
        workers = {rival: stack.enter_context(contextlib.closing(lib.Worker(run, out))) for rival in jobs}
        answers = {rival: workers[rival].ask(**job, in_turns=True) for rival, job in jobs.items()}
        while waiting := [rival for rival, answer in answers.items() if answer is None]:
            answers |= {rival: workers[rival].ask(go=True) for rival in waiting}
    return answers


def measure(args):
    """-> {setting: {rival: {seconds, above_bytes, norms} or {error}}}, title, table"""
    settings, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        data = lib.manifest_of(args, Path(folder) / "data", args.batch_size * (WARM_UP + args.steps + 1))
        common = dict(vars(args), data=str(data), cache=f"{folder}/cache")
        there = [*lib.installed({"TRL GKD": ["trl", "datasets", "accelerate"]}), "plain loop", "ours", CHECKPOINTING]
        for setting, rivals in SETTINGS.items():
            jobs = {rival: {**common, "setting": setting, "rival": rival, "out": f"{folder}/{setting} {rival}"}
                    for rival in rivals if rival in there}
            together = [list(jobs)] if args.device == "cpu" else [[rival] for rival in jobs]  # a GPU holds one
            settings[setting] = {}
            for some in together:
                settings[setting] |= run_in_turns({rival: jobs[rival] for rival in some}, args.out)
            print(f"step, {setting}: {settings[setting]}", flush=True)
    for setting, rivals in settings.items():
        own = rivals["ours"]
        for rival, r in rivals.items():
            if "error" in r or "error" in own:
                rows.append([setting, rival, r.get("error"), *[None] * 3])
                continue
            seconds = lib.median(r["seconds"])
            rows.append([setting, rival, f"{args.batch_size / seconds:.2f}", f"{seconds / lib.median(own['seconds']):.2f}",
                         f"{r['above_bytes'] / 2**30:.2f}", f"{own['above_bytes'] / max(1, r['above_bytes']):.2f}"])
    title = (f"**Training step**: {args.batch_size} rows, answers of {args.answer_tokens} tokens, {args.dtype} autocast, "
             f"{args.device}, {args.whisper}+{args.llm}")
    return settings, title, lib.table(["", "", "rows/s", "ours / it, speed", "GiB above weights and optimizer",
                                       "ours / it, memory"], rows)
