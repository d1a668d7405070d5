"""
The training step against others': same rows, answer ids, models, dtype, threads and optimizer (AdamW), in one run.

Ours is train_kd.main itself, watched at the end of each step. Rivals:
  plain loop    both channels with full (B, T, V) logits of teacher and student and `labels=`, as Ultravox trains
                (ultravox_model.py:_compute_kl_loss, 648efe7); same student, encoder on the audio each step, no caches
  TRL GKD       trl.experimental.gkd, lmbda=0; text only, it has no speech
  TRL Distill   trl.DistillationTrainer with the given answers in the place of those it would generate; text only
Each runs in a process of its own, without gradient checkpointing but where a row of ours names it. Memory counts from
the second step on; after WARM_UP steps they are timed, in turns on a CPU: a step of each, then the next of each.
Called by bench.py.
"""
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import bench_lib as lib
import losses
import model as m
import train_kd

# random weights of the usual shapes, for machines without the models: time does not depend on the weights
LLMS = {"135M": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                     num_key_value_heads=3, vocab_size=49_152, tie_word_embeddings=True),
        "0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                     num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True),
        "1.5B": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                     num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True)}
ENCODERS = {"base": dict(d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048,
                         num_mel_bins=80),
            "large": dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120,
                          num_mel_bins=128)}
CHANNELS = {"dual": ["t2t", "s2t"], "text": ["t2t"]}
NEEDS = {"TRL GKD": ["trl", "datasets", "accelerate"], "TRL Distill": ["trl", "datasets", "accelerate"]}
PHASES = ("data wait", "teacher", "encoder", "student forward", "loss", "backward", "clip, optimizer")
CHANNELS_IN_ONE = "ours, channels together"
MEMORY_ALONE = [CHANNELS_IN_ONE, "ours, checkpointing"]  # both channels; by themselves, so that fewer share the machine
WARM_UP = 3  # steps until the allocator is at rest


def add_arguments(group):
    group.add_argument("--llm", help=f"text LLM of teacher and student, or random:SIZE ({', '.join(LLMS)})")
    group.add_argument("--encoder", help=f"speech encoder, a Whisper, or random:SIZE ({', '.join(ENCODERS)})")
    group.add_argument("--data", help="manifest with answers and audio; without one, questions over noise")
    group.add_argument("--batch-size", type=int, help="rows per step")
    group.add_argument("--answer-tokens", type=int, help="longer answers are cut there")
    group.add_argument("--steps", type=int, help="timed steps of each rival")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16",
                       help="of the computation; what trains is float32")


# ---- models and data ----

def random_llm(size, folder):
    """Llama with random weights of one of LLMS and a byte-level BPE tokenizer -> its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(questions() * 2, trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[1], eos_token=special[2], pad_token=special[2], unk_token=special[0],
        chat_template="{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
                      "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(**LLMS[size], max_position_embeddings=8192, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    write_random(lambda: LlamaForCausalLM._from_config(config, dtype=torch.bfloat16), folder)
    return str(folder)


def write_random(make, folder):
    """Save the model that `make` draws, on a GPU if there is one, and leave nothing there."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        make().save_pretrained(folder)
    torch.cuda.empty_cache()


def random_encoder(size, folder):
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
    config = WhisperConfig(**ENCODERS[size], vocab_size=64, decoder_layers=1, decoder_attention_heads=2,
                           decoder_ffn_dim=32, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1)
    write_random(lambda: WhisperForConditionalGeneration(config).half(), folder)
    WhisperFeatureExtractor(feature_size=ENCODERS[size]["num_mel_bins"]).save_pretrained(folder)
    return str(folder)


def prepare_models(args, folder):
    """--llm, --encoder -> names or folders of (LLM, encoder)."""
    names = []
    for name, make in ((args.llm, random_llm), (args.encoder, random_encoder)):
        kind, _, size = name.partition(":")
        names.append(make(size, folder / make.__name__) if kind == "random" else name)
    return names


def questions():
    return [json.loads(line)["prompt"] for line in (Path(__file__).parent / "questions.jsonl").read_text().splitlines()]


def prepare_data(args, folder, rows):
    """Manifests FOLDER/dual.jsonl and FOLDER/text.jsonl, the same rows with and without audio -> what they are."""
    import soundfile
    (folder / "wav").mkdir(parents=True)
    if args.data and Path(args.data).is_file():
        found = [r for r in train_kd.read_manifest(args.data) if r["response"] and r.get("audio") and r["prompt"]]
        chosen, source = [found[i % len(found)] for i in range(rows)], args.data
    else:
        asked, noise = questions(), random.Random(0)
        chosen, source = [], "questions of tools/questions.jsonl over noise"
        for i in range(rows):
            prompt, answer = asked[i % len(asked)], noise.choices(asked, k=args.answer_tokens)
            samples = np.random.default_rng(i).normal(size=int(16_000 * (0.5 + 0.35 * len(prompt.split())))) * 0.05
            soundfile.write(folder / "wav" / f"{i}.flac", samples, 16_000)
            chosen.append({"prompt": prompt, "response": " ".join(answer), "finish": "length",
                           "seconds": len(samples) / 16_000})
    with open(folder / "dual.jsonl", "w") as dual, open(folder / "text.jsonl", "w") as text:
        for i, row in enumerate(chosen):
            row = {**row, "id": f"row-{i}"}
            if row.get("audio"):
                shutil.copy(row["audio"], folder / "wav" / f"{i}.flac")
            text.write(json.dumps({**row, "audio": None}) + "\n")
            dual.write(json.dumps({**row, "audio": f"wav/{i}.flac"}) + "\n")
    return source


# ---- operations: what a step must compute ----

def tokens_of(passes):
    """Batches, each [positions that all rows share, length of each row] -> tokens in all, and how many are read."""
    whole = sum(sum(lengths) for _, *lengths in passes)
    return whole, whole - sum(shared * (len(lengths) - 1) for shared, *lengths in passes)


def llm_flops(config, passes):
    """One forward each of the body (no output head) over batches as of tokens_of."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width, inner = config.num_attention_heads * head, config.num_key_value_heads * head
    weights = config.hidden_size * (2 * width + 2 * inner + 3 * config.intermediate_size)
    pairs = sum(n * n for _, *lengths in passes for n in lengths)
    return config.num_hidden_layers * (2 * tokens_of(passes)[1] * weights + 4 * pairs * width)


def encoder_flops(config, frames):
    """One forward of a Whisper encoder over clips of so many log-mel frames."""
    dim, total = config.d_model, 0
    for f in frames:
        s = (f + 1) // 2
        total += 2 * f * 3 * config.num_mel_bins * dim + 2 * s * 3 * dim * dim
        total += config.encoder_layers * (2 * s * (4 * dim * dim + 2 * dim * config.encoder_ffn_dim) + 4 * s * s * dim)
    return total


def adapter_flops(config, positions, events, classes):
    """One forward of the adapter, over clips of so many encoder positions -> (what its input needs, all the rest):
    nothing before the first layer trains, so that its backward is half as long."""
    dim, width = config.adapter_dim, config.llm.hidden_size
    first = rest = 0
    for s in positions:
        a = -(-s // m.STACK)
        first += 2 * a * m.STACK * config.encoder.d_model * dim
        rest += config.adapter_layers * (2 * a * (config.adapter_kernel * dim + 13 * dim * dim) + 4 * a * a * dim)
        rest += 2 * a * width * (dim + classes)
    return first, rest + 4 * events * dim * width


def step_flops(config, teacher, counts, classes):
    """Counts of one step (see Watch) -> {part: FLOPs}. Backward = twice the forward, where all trains."""
    vocab, rows = min(config.llm.vocab_size, teacher.vocab_size), sum(counts["rows"])
    first, rest = adapter_flops(config, counts["positions"], counts["events"], classes)
    parts = {"teacher body": llm_flops(teacher, counts["teacher"]),
             "encoder": encoder_flops(config.encoder, counts["frames"]),
             "adapter forward": first + rest, "adapter backward": first + 2 * rest}
    for channel in ("t2t", "s2t"):
        parts[f"student body forward, {channel}"] = llm_flops(config.llm, counts[channel])
        parts[f"student body backward, {channel}"] = 2 * llm_flops(config.llm, counts[channel])
    parts["heads: logits of both, two gradients"] = (2 * rows * vocab
                                                     * (3 * config.llm.hidden_size + teacher.hidden_size))
    return {part: flops for part, flops in parts.items() if flops}


# ---- watching a run ----

class Stop(Exception):
    """Enough steps."""


class Watch:
    """Clock, memory and counts of a run; `end_of_step` is called at the end of each optimizer step.

    `warm_up` steps, then `steps` timed ones; memory counts from the second on. With `phases` the last one is divided
    among PHASES; on a GPU one more is, since dividing waits for it. `in_turns`: each step waits for lib.take_turn.
    """

    def __init__(self, device, steps, warm_up=WARM_UP, phases=False, in_turns=False):
        self.device, self.steps, self.warm_up, self.divided, self.in_turns = device, steps, warm_up, phases, in_turns
        self.done = 0
        self.seconds, self.cpu_seconds, self.records, self.counts, self.phases = [], [], [], [], {}
        self.first_at = self.last = self.rest = self.peak = self.student = None
        self.dividing, self.nested, self.trained = False, [], []
        self.new_counts()

    def new_counts(self):
        self.now = {"teacher": [], "t2t": [], "s2t": [], "rows": [], "frames": [], "positions": [], "events": 0}

    def end_of_step(self, record=None, *_):
        """Raises: Stop after the last step that is wanted."""
        lib.wait(self.device)
        spent = time.perf_counter() - self.last if self.last else None
        self.done += 1
        self.records.append(record if isinstance(record, dict) else {})
        if self.done == 1:
            self.first_at, self.rest = time.time(), lib.rest_bytes(self.device)
        else:
            self.peak = lib.peak_bytes(self.device)
        if self.done > self.warm_up and len(self.seconds) < self.steps:
            self.seconds.append(spent)
            self.cpu_seconds.append(time.process_time() - self.last_cpu)
            self.counts.append(self.now)
        if self.dividing:
            self.phases["step"] = spent
            raise Stop
        if len(self.seconds) == self.steps and not self.divided and self.done > 1:
            raise Stop
        if self.divided and self.done >= self.warm_up and len(self.seconds) == self.steps - (self.device == "cpu"):
            self.dividing, self.phases = True, dict.fromkeys(PHASES, 0.0)
        if self.in_turns:
            lib.take_turn()
        self.new_counts()
        self.last, self.last_cpu = time.perf_counter(), time.process_time()

    def timed(self, phase, function):
        """`function`, whose time counts as `phase`, less that of phases inside it."""
        def wrapper(*args, **kwargs):
            if not self.dividing:
                return function(*args, **kwargs)
            lib.wait(self.device)
            start = time.perf_counter()
            self.nested.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                lib.wait(self.device)
                spent = time.perf_counter() - start
                self.phases[phase] += spent - self.nested.pop()
                if self.nested:
                    self.nested[-1] += spent
        return wrapper

    def counted(self, function, note):
        """`function`, after which note(now, result, *its arguments) writes down what it did."""
        def wrapper(*args, **kwargs):
            result = function(*args, **kwargs)
            note(self.now, result, *args)
            return result
        return wrapper

    def answer(self):
        gradients = sum(p.numel() * p.element_size() for p in self.trained)
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "first_at": self.first_at,
                "rest_bytes": self.rest, "peak_bytes": self.peak, "gradient_bytes": gradients, "phases": self.phases,
                "counts": self.counts, "records": self.records}


def watch_optimizer(watch):
    """train_kd.make_optimizer, whose parameters the watch may count."""
    make = train_kd.make_optimizer

    def wrapper(*args):
        optimizer = make(*args)
        watch.trained = [p for group in optimizer.param_groups for p in group["params"]]
        return optimizer
    return wrapper


# ---- ours ----

def most_steps(job):
    return WARM_UP + job["steps"] + 1


def flags(job, steps):
    """Arguments of train_kd.py that all of ours and the plain loop share."""
    trains = ["adapter", "llm"] if job["setting"] == "dual" else ["llm"]
    return ["--teacher", job["llm"], "--student", f"{job['encoder']}+{job['llm']}", "--data", job["data"],
            "--out", job["out"], "--channels", *CHANNELS[job["setting"]], "--train", *trains, "--ce-weight", "0",
            "--kd-weight", "1", "--temperature", "1", "--batch-size", str(job["batch_size"]),
            "--max-answer-tokens", str(job["answer_tokens"]), "--max-steps", str(steps), "--log-every", "1",
            "--save-every", "1000000", "--dtype", job["dtype"], "--device", job["device"],
            "--feature-cache", job["features"]]


def ours(job, watch):
    """train_kd.main, as it is. Caches off: the teacher reads and the encoder hears in each step."""
    extra = ["--feature-cache", "off"]
    if "caches" in job["rival"]:
        extra = ["--teacher-cache", job["features"] + "-teacher"]
    if "checkpointing" in job["rival"]:
        extra += ["--gradient-checkpointing"]
    if job["rival"] == CHANNELS_IN_ONE:
        one_backward(len(CHANNELS[job["setting"]]))
    train_kd.print_step = watch.end_of_step
    train_kd.make_optimizer = watch_optimizer(watch)
    train_kd.teacher_rows = watch.timed("teacher", train_kd.teacher_rows)
    train_kd.channel_loss = watch.counted(watch.timed("loss", train_kd.channel_loss), lambda now, _, args, items, *rest:
        now["rows"].append(sum(len(i["answer"]) for i in items)))
    train_kd.ctc_loss = watch.timed("loss", train_kd.ctc_loss)
    student = m.SpeechLLM
    student.forward = watch.timed("student forward", student.forward)
    student.features = watch.counted(watch.timed("encoder", student.features), lambda now, _, self, mels:
        now["frames"].extend(mel.shape[1] for mel in mels))
    student.spell = watch.counted(student.spell, lambda now, _, self, features:
        now["positions"].extend(len(f) for f in features))

    def note_channel(now, embeds, self, before, after, speech, *rest):
        watch.student, watch.channel = self, "s2t" if speech else "t2t"
        now["events"] += sum(map(len, speech.values()))

    def note_tokens(now, _, llm, rows, lengths, shared, *rest):
        now[watch.channel if rows[0].is_floating_point() else "teacher"].append([shared, *map(len, rows)])
    student.splice = watch.counted(student.splice, note_channel)
    m.answer_states = watch.counted(m.answer_states, note_tokens)
    torch.Tensor.backward = watch.timed("backward", torch.Tensor.backward)
    torch.nn.utils.clip_grad_norm_ = watch.timed("clip, optimizer", torch.nn.utils.clip_grad_norm_)
    torch.optim.AdamW.step = watch.timed("clip, optimizer", torch.optim.AdamW.step)
    loader = torch.utils.data.dataloader._BaseDataLoaderIter
    loader.__next__ = watch.timed("data wait", loader.__next__)
    try:
        train_kd.main(train_kd.get_args(flags(job, most_steps(job)) + extra))
    except Stop:
        pass


def one_backward(channels):
    """From here Tensor.backward waits for the losses of all channels: their activations live at the same time."""
    backward, held = torch.Tensor.backward, []

    def together(loss):
        held.append(loss)
        if len(held) == channels:
            backward(sum(held))
            held.clear()
    torch.Tensor.backward = together


# ---- rivals ----

def plain_loop(job, watch):
    """Both channels with full logits: per channel a teacher and a student forward with labels=, KL where an answer
    token comes next, backward."""
    args = train_kd.get_args(flags(job, most_steps(job)))
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    student = m.load_student(args.student).to(device)
    teacher, tokenizer = m.load_llm(args.teacher, dtype)
    teacher.to(device).requires_grad_(False)
    student.encoder.requires_grad_(False).to(dtype)
    optimizer = watch_optimizer(watch)(args, student)
    student.train()
    for items in batches(args, student, tokenizer):
        for channel in args.channels:
            if channel == "s2t":
                with autocast(args, dtype):
                    states, spelled, lengths = student.spell(student.features([i["clip"].to(device) for i in items]))
                    speech = dict(enumerate(student.read(states, spelled, lengths)[0]))
            else:
                speech = {}
            with torch.no_grad():
                ids, mask, labels = right_padded([i["teacher_prompt"] for i in items], items, device)
                teacher_logits = teacher(input_ids=ids, attention_mask=mask, labels=labels).logits       # (B, T, V)
            taught = labels[:, 1:] != losses.IGNORE_INDEX
            with autocast(args, dtype):
                before = [i["before"] + ([] if speech else i["said"]) for i in items]
                embeds = student.splice(before, [i["after"] + i["answer"] for i in items], speech)
                prompts = [[0] * (len(e) - len(i["answer"])) for e, i in zip(embeds, items)]
                _, mask, labels = right_padded(prompts, items, device)
                student_logits = student.llm(inputs_embeds=torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True),
                                             attention_mask=mask, labels=labels).logits                  # (B, T', V)
                learned = labels[:, 1:] != losses.IGNORE_INDEX
                loss = F.kl_div(F.log_softmax(student_logits[:, :-1][learned], dim=-1),
                                F.softmax(teacher_logits[:, :-1][taught], dim=-1), reduction="batchmean")
                if speech:
                    ctc = train_kd.ctc_loss(items, spelled, lengths)
                    loss = loss + args.ctc_weight * ctc / sum(len(i["spelling"]) for i in items)
            del teacher_logits, student_logits
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(watch.trained, args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = 1e-6
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        try:
            watch.end_of_step({"loss": loss.item(), "grad_norm": norm.item()})
        except Stop:
            break


def autocast(args, dtype):
    return torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32)


def batches(args, student, tokenizer):
    """The batches that train_kd.main would take, in its order."""
    rows = [r for path in args.data for r in train_kd.read_manifest(path)]
    lengths = train_kd.row_lengths(student.tokenizer, rows, args)
    plan = train_kd.plan_batches(lengths, args.batch_size, args.batch_size, args.max_steps, args.seed)
    return torch.utils.data.DataLoader(train_kd.Rows(rows, student, tokenizer, args), num_workers=args.workers,
                                       batch_sampler=[batch for step in plan for batch in step], collate_fn=list)


def right_padded(prompts, items, device):
    """Prompts and answers -> input_ids, attention_mask, labels, (B, T) each."""
    pairs = [(prompt, i["answer"]) for prompt, i in zip(prompts, items)]
    pad = torch.nn.utils.rnn.pad_sequence
    return [pad([torch.tensor(x) for x in rows], batch_first=True, padding_value=value).to(device) for rows, value in (
        ([p + a for p, a in pairs], 0), ([[1] * len(p + a) for p, a in pairs], 0),
        ([[losses.IGNORE_INDEX] * len(p) + a for p, a in pairs], losses.IGNORE_INDEX))]


def trl_parts(job, steps):
    """What both trainers of TRL get: student, teacher, tokenizer, rows of ids in the order of our batches, options."""
    import datasets
    args = train_kd.get_args(flags({**job, "setting": "text"}, steps))
    args.workers = 0
    student, tokenizer = m.load_llm(job["llm"], torch.float32)
    teacher, _ = m.load_llm(job["llm"], getattr(torch, job["dtype"]))
    like = m.load_student(args.student)  # only for its tokenizer
    rows = [{"prompt": "", "input_ids": i["teacher_prompt"] + i["answer"],
             "completion_mask": [0] * len(i["teacher_prompt"]) + [1] * len(i["answer"])}
            for items in batches(args, like, tokenizer) for i in items]
    tokenizer.padding_side = "left"
    options = dict(output_dir=job["out"], per_device_train_batch_size=job["batch_size"], max_steps=steps, lmbda=0.0,
                   beta=0.0, bf16=job["dtype"] == "bfloat16", gradient_checkpointing=False, learning_rate=2e-5,
                   max_grad_norm=1.0, use_cpu=job["device"] == "cpu", save_strategy="no", report_to=[],
                   logging_steps=1, disable_tqdm=True, dataloader_num_workers=1)
    return student, teacher, tokenizer, datasets.Dataset.from_list(rows), options


def run_trainer(trainer, watch):
    from transformers import TrainerCallback

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *_, **__):
            watch.end_of_step()
    watch.trained = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.add_callback(EndOfStep())
    try:
        trainer.train()
    except Stop:
        pass


def trl_gkd(job, watch):
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    student, teacher, tokenizer, rows, options = trl_parts(job, most_steps(job))

    class InOrder(GKDTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)
    run_trainer(InOrder(student, teacher, GKDConfig(**options), train_dataset=rows, processing_class=tokenizer), watch)


def trl_distill(job, watch):
    from trl import DistillationConfig, DistillationTrainer
    student, teacher, tokenizer, rows, options = trl_parts(job, most_steps(job))
    options.pop("lmbda")  # this one only learns from what it generates; here it finds the answers given

    class GivenAnswers(DistillationTrainer):
        def _generate_and_score_completions(self, inputs):
            ids, masks = [i["input_ids"] for i in inputs], [i["completion_mask"] for i in inputs]
            starts = [mask.index(1) for mask in masks]
            width, answers = max(starts), [x[n:] for x, n in zip(ids, starts)]
            longest = max(map(len, answers))
            given = {"prompt_ids": [[0] * (width - n) + x[:n] for x, n in zip(ids, starts)],
                     "prompt_mask": [[0] * (width - n) + [1] * n for n in starts],
                     "completion_ids": [a + [0] * (longest - len(a)) for a in answers],
                     "completion_mask": [[1] * len(a) + [0] * (longest - len(a)) for a in answers]}
            given = {key: torch.tensor(value, device=self.accelerator.device) for key, value in given.items()}
            return {**given, "num_items_in_batch": given["completion_mask"].sum().float()}
    config = DistillationConfig(**options, shuffle_dataset=False)
    run_trainer(GivenAnswers(student, teacher, config, train_dataset=rows, processing_class=tokenizer), watch)


RUNS = {"plain loop": plain_loop, "TRL GKD": trl_gkd, "TRL Distill": trl_distill}


def run(**job):
    """One process's job -> what its Watch saw, and the counts as FLOPs."""
    if job.get("peak"):
        return {"peak_flops": lib.matmul_peak(job["device"], job["dtype"])}
    is_ours = job["rival"].startswith("ours")
    watch = Watch(job["device"], job["steps"], job.get("warm_up", WARM_UP), is_ours and job["rival"] not in MEMORY_ALONE,
                  job.get("in_turns", False))
    RUNS.get(job["rival"], ours)(job, watch)
    answer = watch.answer()
    if is_ours:
        config, classes = watch.student.config, len(watch.student.processors["classes"]) + 1
        answer["flops"] = [step_flops(config, config.llm, counts, classes) for counts in answer["counts"]]
    return answer


# ---- the part ----

def rivals_of(setting):
    if setting == "dual":
        return ["plain loop", "ours", "ours, caches"]
    return [*lib.installed(NEEDS), "ours", "ours, caches"]


def measure(args):
    """-> {"settings": {dual, text: {rival: ...}}, "peak_flops", "rows": what they are, ...}"""
    log = Path(args.out) / "step.log"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        llm, encoder = prepare_models(args, folder)
        common = {"llm": llm, "encoder": encoder, "features": str(folder / "features"),
                  **{k: getattr(args, k) for k in ("batch_size", "answer_tokens", "steps", "dtype", "device")}}
        source = prepare_data(args, folder, args.batch_size * most_steps(common))
        with lib.Worker(__file__, log) as worker:
            peak = worker.ask(peak=True, **common)["peak_flops"]
        settings = {}
        for setting in CHANNELS:
            jobs = {rival: {**common, "setting": setting, "rival": rival, "data": str(folder / f"{setting}.jsonl"),
                            "out": str(folder / f"{setting} {rival}")} for rival in rivals_of(setting)}
            together = [list(jobs)] if args.device == "cpu" else [[rival] for rival in jobs]  # a GPU holds one
            answers = {}
            for rivals in together:
                answers |= run_in_turns({rival: jobs[rival] for rival in rivals}, log)
            for rival in MEMORY_ALONE if setting == "dual" else []:
                answers |= run_in_turns({rival: {**jobs["ours"], "rival": rival}}, log)
            settings[setting] = {rival: summary(answer, peak) for rival, answer in answers.items()}
    return {"settings": settings, "peak_flops": peak, "rows": source, "llm": args.llm, "encoder": args.encoder,
            **{k: getattr(args, k) for k in ("batch_size", "answer_tokens", "steps", "dtype", "device")}}


def run_in_turns(jobs, log):
    """{rival: job} -> {rival: answer of `run`}; all take their first step, then all their second, ..."""
    workers, answers = {}, {}
    try:
        for rival, job in jobs.items():
            workers[rival] = lib.Worker(__file__, log)
            workers[rival].send(**job, in_turns=True)
            answers[rival] = workers[rival].receive()  # None: it has taken a step
        while waiting := [rival for rival in jobs if answers[rival] is None]:
            for rival in waiting:
                workers[rival].send(go=True)
                answers[rival] = workers[rival].receive()
        for rival, worker in workers.items():
            answers[rival]["started"] = worker.started
            setting, shown = jobs[rival]["setting"], answers[rival].get("seconds", answers[rival])
            print(f"step: {setting}, {rival} {shown}", flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    return answers


def summary(answer, peak):
    """Answer of a rival's process -> medians, and what is behind them."""
    if "error" in answer:
        return answer
    result = {"above_bytes": answer["peak_bytes"] - answer["rest_bytes"] - answer["gradient_bytes"],
              "peak_bytes": answer["peak_bytes"], "gradient_bytes": answer["gradient_bytes"],
              "first_step_s": answer["first_at"] - answer["started"]}
    records = answer["records"]
    if all("grad_norm" in r for r in records):
        result["grad_norm"] = records[0]["grad_norm"]  # of the first step, where all are the same
    if not answer["seconds"]:
        return result
    result |= {"seconds": lib.median(answer["seconds"]), "all_seconds": answer["seconds"],
               "cpu_seconds": lib.median(answer["cpu_seconds"])}  # of all threads
    if "flops" in answer:
        steps, counts = answer["flops"], answer["counts"]
        result["flops"] = {part: sum(f.get(part, 0) for f in steps) / len(steps) for part in steps[0]}
        result["share_of_peak"] = sum(result["flops"].values()) / result["seconds"] / peak
        result["phases"] = answer["phases"]
        result["tokens"] = {"rows": sum(sum(c["rows"]) for c in counts) / len(counts), **{
            channel: [sum(n) / len(counts) for n in zip(*(tokens_of(c[channel]) for c in counts))] for channel in ("t2t", "s2t")}}
        result["log"] = {key: lib.median([r[key] for r in records[1:]]) for key in ("padding", "wait")}
    return result


def report(results):
    """Results of `measure` -> Markdown."""
    lines, batch = [], results["batch_size"]
    for setting, rivals in results["settings"].items():
        own = rivals["ours"]
        titles = {"dual": "by text and by speech", "text": "by text alone"}
        lines += [f"**Training step, {titles[setting]}**: {batch} rows, {results['dtype']} autocast, "
                  f"{results['device']}, {results['llm']}, {results['encoder']}", ""]
        rows = []
        for name, r in rivals.items():
            if "error" in r:
                rows.append([name, r["error"], *[None] * 6])
            elif name in MEMORY_ALONE:
                rows.append([name, None, None, lib.gib(r["above_bytes"]),
                             ratio(own.get("above_bytes"), r["above_bytes"]), lib.gib(r["peak_bytes"]), None, None])
            else:
                share = f"{100 * r['share_of_peak']:.0f} %" if "share_of_peak" in r else None
                rows.append([name, f"{batch / r['seconds']:.2f}", ratio(r["seconds"], own.get("seconds")),
                             lib.gib(r["above_bytes"]), ratio(own.get("above_bytes"), r["above_bytes"]),
                             lib.gib(r["peak_bytes"]), share, f"{r['first_step_s']:.0f}"])
        header = ["", "examples/s", "ours / it, speed", "GiB above weights, gradients, optimizer", "ours / it, memory",
                  "GiB in all", "of the matmul peak", "start to first step, s"]
        lines += [lib.table(header, rows), ""]
    lines += ["**Operations of a step by text and by speech, and where its time goes** (ours; caches off | on)", "",
              work(results), ""]
    ours = results["settings"]["dual"]["ours"]
    if "tokens" in ours:
        (text, read), (speech, heard), rows = (ours["tokens"][key] for key in ("t2t", "s2t", "rows"))
        lines.append(f"A step: {text:.0f} tokens by text, {speech:.0f} by speech, of which {read:.0f} and {heard:.0f} are read, since what "
                     f"all rows share is read once; {rows:.0f} answer rows; rows: {results['rows']}; matmul peak "
                     f"{results['peak_flops'] / 1e12:.2f} TFLOP/s ({results['dtype']}).")
        lines.append("Log of train_kd.py: " + ", ".join(f"{meaning} {ours['log'][key]:.1%}" for key, meaning in (
            ("padding", "padding"), ("wait", "waiting for data"))) + ".")
    return "\n".join(lines)


def ratio(a, b):
    return f"{a / b:.2f}" if a and b and b > 0 else None


def work(results):
    """Table: FLOPs of each part, then the seconds of each phase, without and with caches."""
    both = [results["settings"]["dual"][name] for name in ("ours", "ours, caches")]
    if any("error" in r for r in both):
        return "not measured: " + ", ".join(r["error"] for r in both if "error" in r)
    rows = []
    for part in both[0]["flops"]:
        cells = [r["flops"].get(part, 0.0) for r in both]
        rows.append([part, *(f"{c / 1e12:.3g} TFLOP" for c in cells),
                     *(f"{100 * c / sum(r['flops'].values()):.0f} %" for c, r in zip(cells, both))])
    rows.append(["all operations", *(f"{sum(r['flops'].values()) / 1e12:.3g} TFLOP" for r in both), "100 %", "100 %"])
    for phase in (*PHASES, "rest"):
        cells = [r["phases"]["step"] - sum(r["phases"][p] for p in PHASES) if phase == "rest" else r["phases"][phase]
                 for r in both]
        rows.append([f"time: {phase}", *(f"{c:.3f} s" for c in cells),
                     *(f"{100 * c / r['phases']['step']:.0f} %" for c, r in zip(cells, both))])
    return lib.table(["", "off", "on", "off, share", "on, share"], rows)


def draw(results, path):
    figure, axes = lib.figure(3)
    for axis, (setting, rivals) in zip(axes, results["settings"].items()):
        lib.scatter(axis, {name: (results["batch_size"] / r["seconds"], r["above_bytes"] / 2**30)
                           for name, r in rivals.items() if "error" not in r and name not in MEMORY_ALONE},
                    title=f"step, {setting}", xlabel="examples/s", ylabel="GiB above the state")
    dual = results["settings"]["dual"]
    for place, name in enumerate(("ours", "ours, caches")):
        left = 0.0
        for phase in PHASES if "phases" in dual[name] else ():
            axes[2].barh(place, dual[name]["phases"][phase], left=left, color=f"C{PHASES.index(phase)}",
                         label=None if place else phase)
            left += dual[name]["phases"][phase]
    axes[2].set(title="where a step's time goes", xlabel="seconds", yticks=[0, 1], yticklabels=["ours", "caches"])
    axes[2].legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    lib.serve(run)
