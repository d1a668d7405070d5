"""
Distil a text LLM (teacher) into a speech LLM (student), by text and by speech.

  python train_kd.py --data train.jsonl --eval-data heldout.jsonl --out out/run
  torchrun --nproc_per_node=8 train_kd.py --student WHISPER+LLM --data train.jsonl --out out/run

Reads   manifests of synth_speech.py: JSON lines with id, prompt, audio, response, finish, source
Writes  OUT/last, OUT/best (students), ckpt-STEP-SHA256.pt, log.jsonl, args.json, bad_rows.jsonl

t2t: the student reads the question.  loss = CE(answer) + lambda * tau^2 * KL(teacher || student)
s2t: the student hears it.            the same, from the same teacher, who reads it
sound: rows whose prompt is null.     CE(answer) alone, a mean over rows: no text stands for it
Rows of "source": "student", whose answer it sampled itself, get the divergence alone.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_state_dict, set_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import losses
import model as m

EARLY = 8       # answer tokens before the answer gives the question away: the gap shows there
CHANNELS = ("t2t", "s2t", "sound")
EVAL_ROWS = 16  # measured together
OVERLAP = 0.5   # own answers are refused below: teacher and student think of other tokens
KEYS = ("id", "prompt", "audio", "response", "reference", "finish", "instruction", "system",
        "language", "source")  # of a row; others are not read
FREE_OPTIONS = ("resume", "device", "out", "save_every", "cache", "shard")  # of --resume
TRAINED_ONLY = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    natural, positive = m.number(int, 0), m.number(int, 1)
    rate, weight, cuda = m.number(float, 0, 1), m.number(float, 0), torch.cuda.is_available()
    add = p.add_argument_group("models and data").add_argument
    add("--teacher", default=m.DEFAULT_LLM, help="frozen text LLM: folder or hub id, NAME@REVISION")
    add("--student", default=m.DEFAULT_STUDENT, help="WHISPER+LLM, a speech LLM, or one of ours")
    add("--data", nargs="+", required=True, help="manifests to train on, of synth_speech.py")
    add("--eval-data", nargs="+", default=[], help="manifests to measure on")
    add("--max-bad-rows", type=natural, default=0, help="so many may be left out, and are listed")
    add("--labels", choices=["response", "reference"], default="response", help="whose answers")
    add("--max-answer-tokens", type=positive, default=256, help="longer answers are cut there")
    add("--out", required=True, help="output folder")
    add("--cache", help="what Whisper heard, kilobytes a clip; None: .cache beside the data")
    add("--teacher-cache", help="folder of the teacher's hidden rows: it runs once, leaves memory")
    add("--teach-only", action="store_true", help="fill --teacher-cache, on any machine, and end")
    add = p.add_argument_group("method").add_argument
    add("--channels", nargs="+", choices=["t2t", "s2t"], default=["t2t", "s2t"],
        help="text to text, speech to text")
    add("--t2t-weight", type=weight, default=1.0, help="of the text channel; speech has 1")
    add("--sound-weight", type=weight, default=1.0, help="of rows without a teacher")
    add("--loss", choices=list(losses.DIVERGENCES), default="forward_kl", help="the divergence")
    add("--kd-weight", type=weight, default=0.5, help="lambda of the divergence")
    add("--ce-weight", type=weight, default=1.0, help="of cross-entropy; 0 = pure distillation")
    add("--early-tokens", type=natural, default=0, help="so many weigh more, the first twice")
    add("--temperature", type=m.number(float, 0.01), default=2.0, help="tau; the loss has tau^2")
    add("--beta", type=m.number(float, 1e-6, 1 - 1e-6), default=0.5, help="of jsd and skew_kl")
    add = p.add_argument_group("what trains").add_argument
    add("--train", nargs="+", choices=["encoder", "adapter", "llm"], default=["adapter", "llm"],
        help="parts that train; Whisper never does")
    add("--lora-rank", type=natural, default=0, help="of LoRA, at --lr-llm 1e-4 to 1e-3; 0 = off")
    add("--lr-encoder", type=rate, default=1e-5, help="peak learning rate")
    add("--lr-adapter", type=rate, default=2e-5, help="peak learning rate, 1e-5 to 1e-4")
    add("--lr-llm", type=rate, default=2e-5, help="peak learning rate; the paper: 5e-6 for 7 B")
    add = p.add_argument_group("optimisation").add_argument
    add("--max-steps", type=natural, default=0, help="optimizer steps; 0 = --epochs")
    add("--epochs", type=m.number(float, 0.001), default=2, help="over the rows with a teacher")
    add("--batch-size", type=positive, default=8, help="rows with a teacher per GPU per forward")
    add("--sound-batch-size", type=positive, default=8, help="rows without one beside them, if any")
    add("--global-batch-size", type=natural, default=0, help="of all GPUs; 0: no accumulation")
    add("--lr-warmup-steps", type=natural, default=10, help="linear, times a cosine to zero")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32",
        help="of the computation (on a CPU bfloat16 pays with AMX); what trains is float32")
    add("--gradient-checkpointing", action="store_true", help="less memory, about 30%% slower")
    add("--shard", action="store_true", help="FSDP2 in place of DDP: models split over the GPUs")
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu", help="to run on")
    add("--seed", type=m.number(int, 0, 2**32), default=0, help="of order, LoRA, dropout")
    add = p.add_argument_group("evaluation, checkpoints").add_argument
    add("--eval-every", type=natural, default=0, help="steps; 0 = before the first, after the last")
    add("--save-every", type=positive, default=50, help="optimizer steps between checkpoints")
    add("--resume", action="store_true", help="go on from OUT's newest whole checkpoint, if any")
    args = p.parse_args(argv)
    args.cache = args.cache or str(Path(args.data[0]).parent / ".cache")  # all runs share it
    at_once = args.batch_size * m.ranks()[1]  # rows of one forward on all GPUs
    size = args.global_batch_size = args.global_batch_size or at_once
    frozen = "llm" not in args.train
    wrong = [(args.lora_rank and frozen, "--lora-rank trains the LLM: add llm to --train"),
             (frozen and args.channels == ["t2t"],
              "--channels t2t trains nothing without --train llm"),
             (args.shard and "RANK" not in os.environ, "--shard needs torchrun"),
             (args.teach_only and not args.teacher_cache,
              "--teach-only fills the folder of --teacher-cache; name it"),
             (not args.kd_weight + args.ce_weight,
              "--kd-weight 0 and --ce-weight 0 leave nothing to learn; set one of them"),
             (size % at_once,
              f"--global-batch-size {size} is not a multiple of --batch-size {args.batch_size} x "
              f"{m.ranks()[1]} processes; use {at_once * max(1, size // at_once)}")]
    for name in ("data", "eval_data", "channels", "train"):
        given = getattr(args, name)
        wrong.append((len(set(given)) < len(given),
                      f"--{name.replace('_', '-')} {' '.join(given)}: one is named twice"))
    for found, message in wrong:
        if found:
            p.error(message)
    return args


# ---- rows ----

def read_manifest(path, seen=None, bad=None):
    """Manifest -> rows, ids with the folder's name in front of them, absolute audio paths, `own`:
    did the student sample the answer. What is wrong with a row raises ValueError that names the
    line, or is added to the list `bad`. seen: {id: where it was met}, of the manifests before."""
    path, seen = Path(path), {} if seen is None else seen
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest; synth_speech.py writes one")

    def parse(row, where):
        lost = [key for key in ("id", "prompt", "response") if key not in row]
        if lost:
            raise ValueError(f"{where}: no {', '.join(lost)}; expected {', '.join(KEYS[:4])}")
        m.check_texts(row, where, *KEYS[1:])
        name = f"{path.resolve().parent.name}/{row['id']}"  # ids are unique within a folder
        if not isinstance(row["id"], str | int) or seen.setdefault(name, where) != where:
            raise ValueError(f"{where}: id {row['id']!r} is no text, or also that of "
                             f"{seen.get(name)}; every row needs its own")
        prompt, audio = row["prompt"], row.get("audio")
        prompt = prompt and m.untagged(prompt, where)  # others' <audio> at its ends
        if not (audio if prompt is None else prompt.strip()):
            raise ValueError(f"{where}: neither prompt nor audio, or a blank prompt; expected text,"
                             " or null where none stands for the sound")
        audio = audio and m.file_below(path.parent, audio, where)
        return {**row, "id": name, "prompt": prompt, "audio": audio,
                "own": row.get("source") == "student"}

    return m.json_lines(path, parse, bad)


def channels_of(row, args):
    """The channels that a row serves: those of --channels, or "sound"; none without an answer."""
    if row["prompt"] is None:  # nothing that a teacher could read
        return ["sound"] if row["response"] else []
    if not row.get(args.labels):
        return []
    return [c for c in args.channels if c == "t2t" or row.get("audio")]  # no clip: by text alone


def read_rows(args):
    """-> rows to train on, which some channel can use; rows to measure on, which serve all: all are
    compared on the same questions; {channel: how many to train on}; bad rows."""
    train_rows, eval_rows, bad, seen = [], [], [], {}
    counts, keys = collections.Counter(), set()
    judged = args.labels == "response" and args.kd_weight  # is what a student said
    for path in args.data:
        for row in read_manifest(path, seen, bad):
            channels = channels_of(row, args)
            keys.update(row)  # for the error below
            if row["own"] and not (judged and row["prompt"]):
                bad.append({"id": row["id"], "reason": f"row {row['id']!r}: of source student; "
                            "expected a prompt, --labels response and --kd-weight above 0"})
            elif channels:
                train_rows.append(row)
                counts.update(channels)
    for path in args.eval_data:  # it may be a part of the training data
        rows = read_manifest(path, {}, bad)
        eval_rows += [row for row in rows if channels_of(row, args) == args.channels]
    m.leave_out(bad, args.max_bad_rows, args.out, m.ranks()[0] == 0)  # before what follows of it
    missing = [channel for channel in args.channels if not counts[channel]]
    if missing and not 0 < counts["sound"] == len(train_rows):  # sounds alone need no teacher
        needs = f"{'prompt' if missing[0] == 't2t' else 'audio'} and {args.labels}"
        strange = keys - {*KEYS, "own"}  # `audio` under another name
        raise ValueError(f"{' '.join(args.data)}: no row has {needs}, which channel {missing[0]} "
                         f"needs; unknown keys: {', '.join(sorted(strange)) or 'none'}; rename one")
    if args.eval_data and not eval_rows:
        raise ValueError(f"--eval-data {' '.join(args.eval_data)}: no row can be measured; that "
                         f"needs prompt, audio and {args.labels}")
    return train_rows, eval_rows, counts, bad


def answer_ids(tokenizer, row, labels, max_tokens):
    """The answer, tokenised once for teacher and both channels; a cut one teaches no stopping.
    What is said about a sound has no second form."""
    key = "response" if row["prompt"] is None else labels
    ids = m.text_ids(tokenizer, row[key])
    cut = (row.get("finish") == "length" and key == "response") or len(ids) > max_tokens
    return ids[:max_tokens] + ([] if cut else [m.end_token(tokenizer)])  # the end counts, too


def make_item(row, args, student, teacher_tokenizer, heard_of, taught_of=None):
    """A row -> what a step needs of it, and no model has to make: id, answer (token ids),
    teacher_ids (the teacher's prompt), t2t, s2t, sound (the student's, of the channels that the row
    serves), own (did it answer itself), taught (the teacher's rows (n, H'), if they are kept)."""
    item = {"id": row["id"], "own": row.get("own", False), "teacher_ids": [],
            "answer": answer_ids(teacher_tokenizer, row, args.labels, args.max_answer_tokens)}
    for channel in channels_of(row, args) if student is not None else ():
        if channel == "t2t":
            item["t2t"] = student.prompt({**row, "audio": None})  # reads, hears nothing
        else:
            item[channel] = student.prompt(row, heard_of(row))  # s2t, sound
    if row["prompt"] is not None:
        before, after = m.chat_parts(teacher_tokenizer, row.get("system"), row.get("instruction"))
        item["teacher_ids"] = before + m.text_ids(teacher_tokenizer, row["prompt"]) + after
        if taught_of:
            item["taught"] = taught_of(item)
    return item


def check_rows(rows, item_of, llms, bad):
    """Make every item once, before anything trains -> good rows, which now tell the `tokens` of
    their answers. What is wrong with the others goes to the list `bad`."""
    (rank, world), found = m.ranks(), {}  # row number -> what is wrong; tokens
    contexts = [getattr(llm.config, "max_position_embeddings", 0) for llm in filter(None, llms)]
    context = min(filter(None, contexts), default=math.inf)  # of all models
    for k in range(rank, len(rows), world):  # each process tries its share
        try:
            item = item_of(rows[k])
            prompts = [item[channel] for channel in CHANNELS if channel in item]
            sizes = [len(item["teacher_ids"]), *map(m.positions, prompts)]
            size = max(sizes) + len(item["answer"])
            if size > context:
                raise ValueError(f"{size} tokens of prompt, speech and answer, the models have room"
                                 f" for {context}; shorten it or lower --max-answer-tokens")
            if "s2t" in item and not item["s2t"].words:  # to learn from it would teach guessing
                raise ValueError(f"no words are heard in {rows[k]['audio']}; expected speech; take "
                                 "audio out of the row, or the row")
            found[k] = None, len(item["answer"])
        except ValueError as error:
            found[k] = f"row {rows[k]['id']!r}: {error}", 0
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, found)  # every rank leaves out the same rows
        found = collections.ChainMap(*parts)
    good = []
    for k, row in enumerate(rows):
        reason, tokens = found[k]
        if reason:
            bad.append({"id": row["id"], "reason": reason})
        else:
            good.append({**row, "tokens": tokens})
    return good


def plan_steps(rows, args):
    """Which rows each step reads: a list of steps, each a list of micro-batches, which processes
    share, each a list of row numbers. A function of its arguments alone: no restart changes it, nor
    another number of processes. Questions about sounds come in turn: a rare one is learned, too."""
    def drawn(numbers):  # without end, each epoch in an order of its own
        for epoch in itertools.count():
            yield from random.Random(f"{args.seed} {epoch}").sample(numbers, len(numbers))

    if not rows:
        raise ValueError("no row is left to train on; mend the bad ones, or give more")
    questions = {False: {}, True: {}}  # has it no teacher -> {question about the sound: rows}
    for k, row in enumerate(rows):
        sound = row["prompt"] is None
        questions[sound].setdefault(sound and row.get("instruction"), []).append(k)
    micro_batches = args.global_batch_size // args.batch_size  # of a step, of all processes
    steps, turns, plan = args.max_steps, [], []
    for sound, batch_size in ((False, args.batch_size), (True, args.sound_batch_size)):
        some = list(questions[sound].values())
        count, size = sum(map(len, some)), micro_batches * batch_size
        if 0 < count < size:
            raise ValueError(f"{count} rows {'without' if sound else 'with'} a teacher and with "
                             f"{args.labels}, a step has {size}; give more, or a smaller batch")
        if count:
            steps = steps or max(1, round(args.epochs * count / size))  # the first kind's epochs
            turns.append((size, itertools.cycle([drawn(numbers) for numbers in some])))
    for _ in range(steps):
        plan.append([[] for _ in range(micro_batches)])
        for size, orders in turns:
            for k in range(size):
                plan[-1][k % micro_batches].append(next(next(orders)))  # next question's next row
    return plan


# ---- caches: what Whisper heard, what the teacher's body gave ----

def fingerprint(model, *more):
    """Twelve characters that change with a model's weights, and with what else is named."""
    digest = hashlib.sha1(repr(more).encode())
    for value in model.state_dict().values():  # a few of every tensor: a merged LoRA is seen
        some = value.flatten()[::max(1, value.numel() // 256)]                    # (256,) or so
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def cached(folder, things, key_of, compute, what):
    """Let each thing be computed once, by some process, into FOLDER/SHA256(KEY).safetensors ->
    function from it to its {key: tensor}. compute: list of things -> pairs of thing and tensors;
    32 go together, which depends on `things` alone: a restart gives the same bits."""
    def path_of(thing):
        return folder / f"{hashlib.sha256(key_of(thing).encode()).hexdigest()}.safetensors"

    (rank, world), unique = m.ranks(), {}
    for thing in things:
        unique.setdefault(path_of(thing), thing)  # a clip of many rows is heard once
    folder.mkdir(parents=True, exist_ok=True)
    paths, there = list(unique), set(folder.glob("*.safetensors"))
    batches = [paths[start:start + 32] for start in range(32 * rank, len(paths), 32 * world)]
    todo = [batch for batch in batches if not there.issuperset(batch)]  # as a whole: same bits
    for batch in tqdm(todo, desc=what, unit="batch", disable=rank > 0 or not todo):  # 32 things
        for thing, tensors in compute([unique[path] for path in batch]):
            path = path_of(thing)
            if path not in there:  # what is there may have met other rows: its bits stay
                temporary = path.with_suffix(f".{os.getpid()}")
                save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary)
                os.replace(temporary, path)  # whole, or not there
    if world > 1:
        dist.barrier()  # all read what all wrote
    return lambda thing: load_file(path_of(thing))


def hear_all(args, student, rows):
    """Let Whisper hear every clip once -> function from a row to what was heard of it: by the bytes
    of the clip, language and Whisper's weights. Students of transformers hear at each step."""
    if not isinstance(student, m.SpeechLLM):
        return lambda row: None
    student.whisper.to(args.device)  # first: of sharded models, too
    digest = functools.cache(m.digest)

    def compute(batch):
        good, waveforms = [], []
        for row in batch:
            with contextlib.suppress(ValueError):  # a bad row: heard_of says why
                waveforms.append(m.load_audio(row["audio"]))
                good.append(row)
        for row, heard in zip(good, student.hear(waveforms, [r.get("language") for r in good])):
            yield row, {"ids": heard.ids, "states": heard.states.half(),  # 16 bits are enough
                        "sound": heard.sound.half()}

    def heard_of(row):
        try:
            return student.whisper.heard(**kept_of(row))
        except FileNotFoundError:
            m.load_audio(row["audio"])  # raises ValueError
            raise

    spoken = [row for row in rows if row.get("audio")]
    spoken.sort(key=lambda row: (os.path.getsize(row["audio"]), row["id"]))  # to end together
    folder = Path(args.cache, fingerprint(student.whisper, "mean so far"))  # what a sound is, too
    kept_of = cached(folder, spoken, lambda row: f"{digest(row['audio'])} {row.get('language')}",
                     compute, "hearing")
    return heard_of


def align_sounds(student, rows, heard_of):
    """Let a sound layer begin with what rows without a teacher say about their clips -> number of
    clips. An answer counts by the mean embedding of what its question's other answers lack, less
    the mean over them; one that is given once (a transcript) tells words, not sound."""
    table, questions = student.llm.get_input_embeddings(), {}
    table = table(torch.arange(len(table.weight), device=table.weight.device)).detach().float()
    for row in rows:
        if row["prompt"] is None:
            ids = tuple(m.text_ids(student.tokenizer, row["response"]))
            questions.setdefault(row.get("instruction"), []).append((row, ids))
    sounds, targets = {}, {}  # clip -> (A, D), (H,)
    for answers in questions.values():
        counts = collections.Counter(ids for _, ids in answers)
        answers = [(row, ids) for row, ids in answers if counts[ids] > 1]  # no transcripts
        common = set.intersection(*[set(ids) for _, ids in answers]) if answers else ()
        vectors = []                                                              # (H,) each
        for _, ids in answers:
            own = [token for token in ids if token not in common]
            vectors.append(table[own].sum(0) / max(1, len(own)))
        middle = torch.stack(vectors).mean(0) if vectors else 0
        for (row, _), vector in zip(answers, vectors):
            clip, offset = row["audio"], vector - middle
            targets[clip] = targets.get(clip, 0) + offset  # several questions ask about a clip
            sounds[clip] = heard_of(row).sound.to(table.device)
    if sounds:
        student.adapter.align(list(sounds.values()), torch.stack([targets[c] for c in sounds]))
    student.adapter.listens.fill_(True)
    return len(sounds)


def teach_all(args, teacher, item_of, rows, say):
    """Let the teacher's body read each row once, and leave memory -> function from item to its
    hidden rows (n, H'), which give the exact divergence; a few of the largest logits would not."""
    def compute(batch):
        teacher.to(args.device)  # not before something is to be computed
        return zip(batch, ({"x": x} for x in teacher_rows(teacher, batch)))

    def key_of(item):
        return str([item["teacher_ids"], item["answer"]])

    asked = [item_of(row, student=None) for row in rows if row["prompt"] is not None]  # no audio
    lengths = {key_of(item): len(item["answer"]) for item in asked}  # in several voices it is one
    tokens, head = sum(lengths.values()), teacher.get_output_embeddings()
    gib = tokens * head.in_features * teacher.dtype.itemsize / 2**30
    folder = Path(args.teacher_cache, fingerprint(teacher, teacher.dtype, "scaled"))
    say(f"teacher: {len(lengths)} rows, {tokens} tokens of answers, {gib:.3g} GiB in {folder}")
    kept_of = cached(folder, asked, key_of, compute, "teaching")
    teacher.base_model.to("meta")  # its head stays
    head.to(args.device)
    return lambda item: kept_of(item)["x"]


# ---- one pass through teacher and student ----

@torch.no_grad()
def teacher_rows(teacher, items):
    """One teacher forward for both channels -> the hidden rows that predict the answers, a list of
    (n_i, H'); the items' own if they carry them. The student's own LLM has its adapters off."""
    if all("taught" in item for item in items):
        return [item["taught"] for item in items]
    ids = [item["teacher_ids"] + item["answer"] for item in items]
    rows = [torch.tensor(some, device=teacher.device) for some in ids]
    lengths = [len(item["answer"]) for item in items]
    shared = len(os.path.commonprefix([item["teacher_ids"] for item in items]))  # template's tokens
    own, training = hasattr(teacher, "peft_config"), teacher.training  # own: the student's LLM
    teacher.eval()  # no dropout
    if own:
        teacher.disable_adapters()
    states = m.answer_states(teacher, rows, lengths, shared) * m.logit_scale(teacher)  # (N, H')
    if own:
        teacher.enable_adapters()
    teacher.train(training)  # the student's own goes on training
    return states.split(lengths)


def chunk_rows_of(head):
    """Rows whose logits exist at the same time. On a CPU 128 MiB of each model's, twice that if
    each chunk has to upcast the head; on a GPU more, since a chunk costs kernel launches."""
    rows = 2**(25 if head.dtype == torch.float32 and not head.is_cuda else 26) // len(head)
    return max(256, rows) if head.is_cuda else 2 ** max(6, int(math.log2(rows)))


def token_weights(args, channel, item):
    """Weights of CE and of the divergence of an answer's tokens, (n, 2). A sound's are 1 in sum: a
    transcript of twelve tokens would drown "Fast."."""
    count = len(item["answer"])
    if channel == "sound":
        return torch.full((count, 2), 1 / max(1, count))
    # DIFFERS: CORD (arXiv:2601.16547) lets weights fall from 2 to 1 over the whole answer
    kd = 1 + (args.early_tokens - torch.arange(count)).clamp(min=0) / max(1, args.early_tokens)
    return torch.stack([torch.full((count,), float(not item["own"])), kd], 1)


def channel_loss(args, channel, llms, hidden, items):
    """Sums over a channel's answer tokens -> (loss, ce, kd). llms: student's, teacher's (or None),
    whose rows the items carry. Rows without a teacher get CE, whatever --ce-weight is."""
    (llm, teacher), ce_weight, kd_weight = llms, args.ce_weight, args.kd_weight
    # (n_i, H') each; a row that stands in has an answer of no token
    taught = [item["taught"][:len(item["answer"])] for item in items if "taught" in item]
    if channel == "sound":  # nobody else can tell what it is
        ce_weight, kd_weight = 1.0, 0.0
    if not kd_weight:  # a stand-in, of the right shape
        teacher, taught = llm, [hidden.detach()]
    heads = [x.get_output_embeddings().weight for x in (llm, teacher)]  # (V, H), (V', H')
    targets = [token for item in items for token in item["answer"]]  # (N,)
    row_weights = torch.cat([token_weights(args, channel, item) for item in items])
    return losses.fused_ce_kd(  # chunk by chunk: no (N, V) logits ever exist
        student_hidden=hidden, student_weight=heads[0], student_logit_scale=m.logit_scale(llm),
        teacher_hidden=torch.cat(taught).to(hidden.device), teacher_weight=heads[1],
        targets=torch.tensor(targets, device=hidden.device), kind=args.loss, beta=args.beta,
        row_weights=row_weights.to(hidden.device), temperature=args.temperature,
        ce_weight=ce_weight, kd_weight=kd_weight, chunk_rows=chunk_rows_of(heads[0]))


# ---- evaluation ----

@torch.no_grad()
def measure(student, teacher, items, channels, autocast):
    """Compare with the teacher, row by row -> {channel: [(3, n)]} over each answer's tokens: KL in
    nats at tau 1; 1 = both prefer one token; the share of the likeliest that both have."""
    answers, results = [item["answer"] for item in items], {}
    lengths = [len(answer) for answer in answers]
    taught = torch.cat(list(teacher_rows(teacher, items))).to(student.llm.device)  # (N, H')
    for channel in channels:
        with autocast():
            hidden = student([item[channel] for item in items], answers)          # (N, H)
        kl, agree, overlap = losses.token_kl(  # (N,) each
            student_hidden=hidden, student_weight=student.llm.get_output_embeddings().weight,
            teacher_hidden=taught, teacher_weight=teacher.get_output_embeddings().weight,
            student_logit_scale=m.logit_scale(student.llm))
        results[channel] = torch.stack([kl, agree.float(), overlap]).split(lengths, 1)
    return results


def evaluate(channels, student, teacher, rows, item_of, autocast):
    """Every rank measures its share -> record for the log: KL, agreement and overlap, over all
    answer tokens and over the first EARLY, of each channel."""
    rank, world = m.ranks()
    student.eval()  # no dropout
    sums, share = torch.zeros(len(channels), 2, 4, dtype=torch.float64), rows[rank::world]
    # as many are read on every rank, since sharded models work together; one more does not count
    read = share if len(share) * world >= len(rows) else share + rows[:1]
    for start in range(0, len(read), EVAL_ROWS):
        items = [item_of(row) for row in read[start:start + EVAL_ROWS]]
        found = measure(student, teacher, items, channels, autocast)
        for total, channel in zip(sums, channels):
            for values in found[channel][:len(share) - start]:                    # (3, n)
                values = torch.cat([values, torch.ones_like(values[:1])]).double()
                total += torch.stack([values.sum(1), values[:, :EARLY].sum(1)])
    sums = sums.to(student.llm.device)
    if world > 1:
        dist.all_reduce(sums)  # of counts and sums, so that the mean is exact
    record = {}
    for channel, parts in zip(channels, sums.tolist()):
        for suffix, (*totals, tokens) in zip(("", "8"), parts):
            for name, total in zip(("kl", "agree", "overlap"), totals):
                record[f"eval_{name}{suffix}_{channel}"] = total / max(1, tokens)
    return record


def check_own(args, student, teacher, rows, item_of, autocast):
    """ValueError unless OVERLAP of the likeliest tokens in the student's own answers, by speech if
    it is heard, are the teacher's, too -> the share."""
    heard = [row for row in rows if "s2t" in channels_of(row, args)]
    channel, rows = ("s2t", heard) if heard else ("t2t", rows)
    record = evaluate([channel], student, teacher, rows[:EVAL_ROWS], item_of, autocast)
    share = record[f"eval_overlap_{channel}"]  # one number on all ranks
    if not share >= OVERLAP:
        raise ValueError(f"rows of source student, e.g. {rows[0]['id']!r}: of this student's 64 "
                         f"likeliest tokens {share:.2f} are the teacher's, expected {OVERLAP} or "
                         "more; let this student answer again, or take a teacher of its kind")
    return share


# ---- what trains ----

@torch.no_grad()
def check_pair(teacher, teacher_tokenizer, student):
    """Same ordinary vocabulary (special tokens may be named differently), same end, plain heads."""
    tokenizers = teacher_tokenizer, student.tokenizer
    taught, spoken = (t.get_vocab().items() - t.get_added_vocab().items() for t in tokenizers)
    ends, differ = [m.end_token(tokenizer) for tokenizer in tokenizers], sorted(taught ^ spoken)
    if differ or ends[0] != ends[1]:
        example = differ[0][0] if differ else None
        raise RuntimeError(f"teacher and student need one tokenizer: {tokenizers[0].name_or_path} "
                           f"and {tokenizers[1].name_or_path} differ, e.g. in {example!r}, and end "
                           f"a turn with {ends}")
    for llm in (teacher, student.llm):
        capped = getattr(llm.config.get_text_config(decoder=True), "final_logit_softcapping", None)
        ids, head = torch.arange(9, device=llm.device), llm.get_output_embeddings().weight
        hidden = m.answer_states(llm, [llm.get_input_embeddings()(ids)], [8]) * m.logit_scale(llm)
        logits = llm(input_ids=ids[None]).logits[0, :-1]
        if capped or (hidden @ head.T - logits).norm() > 0.02 * logits.norm():
            raise RuntimeError(f"{llm.config.model_type}: its logits are capped, or not its hidden "
                               "rows times its head; choose another model")


def load_teacher(args, student, dtype):
    """-> (teacher, tokenizer); with LoRA on the teacher's own weights, the student's LLM."""
    teacher, tokenizer = m.load_llm(args.teacher, dtype)
    check_pair(teacher, tokenizer, student)
    own = student.llm.state_dict()
    if args.lora_rank and not args.teacher_cache and not args.shard and all(
            k in own and torch.equal(own[k].to(v), v) for k, v in teacher.state_dict().items()):
        teacher = student.llm  # asked with its adapters off: one copy in memory
    return teacher.requires_grad_(False), tokenizer  # it stays as it is: the answers are its own


def choose_what_trains(args, student, dtype):
    """Parts of --train stay in float32 and train; the rest is frozen, the LLM in `dtype`."""
    student.requires_grad_(False)  # then what --train names
    for name in args.train:
        if name not in student.parts():
            raise ValueError(f"--train {name}: {args.student} trains "
                             f"{', '.join(student.parts())}; its Whisper stays as it is")
        torch.nn.ModuleList(student.parts()[name]).requires_grad_(True)
    if args.lora_rank:
        student.llm.name_or_path = args.student.partition("+")[2] or args.student  # peft asks
        torch.manual_seed(args.seed)  # it starts at random
        m.add_lora(student.llm, args.lora_rank)
    for name, parameter in student.named_parameters():  # module.to would round RoPE's frequencies
        if "embed_positions" in name:  # sinusoids
            parameter.requires_grad_(False)
        if not parameter.requires_grad and not name.startswith(("adapter.", "whisper.")):
            parameter.data = parameter.data.to(dtype)


def make_optimizer(args, student):
    """AdamW over the parts that train; matrices decay, vectors do not."""
    groups = []
    for name in args.train:
        part = torch.nn.ModuleList(student.parts()[name])
        for decay, matrices in ((0.01, True), (0.0, False)):  # no norms, biases
            chosen = [p for p in part.parameters() if p.requires_grad and (p.dim() > 1) == matrices]
            groups.append({"params": chosen, "weight_decay": decay, "part": name})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)  # main sets lr


def update(args, optimizer, where):
    """Clip each part's gradient by itself, step the optimizer -> norms for the log."""
    norms = {}
    for name in args.train:  # part by part: the LLM's gradient would drown the adapter's
        groups = [group["params"] for group in optimizer.param_groups if group["part"] == name]
        norm = torch.nn.utils.clip_grad_norm_(sum(groups, []), 1.0)
        norms[f"norm_{name}"] = norm = float(norm.full_tensor() if args.shard else norm)
        if not math.isfinite(norm):
            raise RuntimeError(f"gradient norm {norm} of {name} in {where}; lower --lr-{name}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms


def shard(student, teacher, dtype, device):
    """FSDP2: layers one by one, then the rest; gathered in `dtype`, gradients are summed in
    float32; the adapter is all float32. The teacher's head stays whole."""
    mesh = dist.device_mesh.init_device_mesh(device, (dist.get_world_size(),))
    options = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False))
    for llm in filter(None, (student.llm, teacher)):
        lists = (x for x in llm.base_model.modules() if isinstance(x, torch.nn.ModuleList))
        for layer in next(lists):  # the outermost list: its layers
            fully_shard(layer, **options)
    fully_shard(student.parts()["adapter"], mesh=mesh, reshard_after_forward=False,
                mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    listener = getattr(student, "whisper", torch.nn.Module())
    fully_shard(student, ignored_params=set(listener.parameters()), **options)
    if teacher is not None:
        fully_shard(teacher.base_model, reshard_after_forward=True, **options)
        teacher.get_output_embeddings().to(device)  # each chunk of the loss reads all of it


# ---- checkpoints, log ----

def save_folder(student, folder, dtype):
    """The student as a folder of transformers. Every rank must call it, the first one writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(student, options=options)  # gathered, if it is sharded
    if not m.ranks()[0]:
        m.save_student(student, folder, dtype, state)


def save_checkpoint(args, student, optimizer, step, best, identity):
    """Trainable weights and everything else that a bit-exact continuation needs; complete or not
    there. Every rank must call it, the first one writes. Raises OSError if it cannot be written."""
    weights, moments = get_state_dict(student, optimizer, options=TRAINED_ONLY)
    if m.ranks()[0]:
        return
    for name, parameter in student.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:  # torch leaves out one alone of a tied head's two names
            weights.pop(name, None)
    temporary = Path(args.out, "ckpt.tmp")  # beside its place: a rename cannot be half done
    try:
        with open(temporary, "wb") as file:
            torch.save({"model": weights, "optimizer": moments, "step": step, "best": best,
                        "identity": identity}, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it has its name
    except (RuntimeError, OSError) as error:  # torch does not say why, the system not where
        gib = shutil.disk_usage(args.out).free / 2**30
        raise OSError(f"{temporary} cannot be written ({error}): {gib:.2f} GiB are free") from error
    digest = m.digest(temporary)[:16]  # torch.load does not see a flipped bit
    os.replace(temporary, Path(args.out, f"ckpt-{step:06d}-{digest}.pt"))
    written = sorted(Path(args.out).glob("ckpt-*.pt"), key=os.path.getmtime)
    for old in written[:-2]:  # the last two stay, whatever their steps: one may be damaged
        old.unlink()


def load_checkpoint(found, student, optimizer, identity):
    """Restore the newest whole one of those found -> step, best score, names of damaged ones."""
    path = next((p for p in found if p.stem.endswith(m.digest(p)[:16])), None)
    if path is None:
        raise RuntimeError(f"{found[0].parent}: no checkpoint has the SHA-256 that its name says "
                           f"({len(found)} tried); copy one back, or choose another --out")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # ranks share it
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: no checkpoint can be read from it ({str(error)[:99]}); start "
                         "afresh in another --out") from error
    old = saved["identity"]
    changed = [f"{k} {old.get(k)!r} -> {v!r}" for k, v in identity.items() if old.get(k) != v]
    if changed:
        raise ValueError(f"{path} was written by another run; changed: {', '.join(changed)}; "
                         "repeat the old ones, or start afresh in another --out")
    set_state_dict(student, optimizer, model_state_dict=saved["model"],
                   optim_state_dict=saved["optimizer"], options=TRAINED_ONLY)  # sharded or not
    return saved["step"], saved["best"], [damaged.name for damaged in found[:found.index(path)]]


def begin_log(args, step):
    """args.json; log.jsonl up to a step's evaluation, which is repeated: as without a stop."""
    path = Path(args.out, "log.jsonl")
    rows = m.json_lines(path, lambda row, _: row, []) if path.exists() else []  # whole lines
    kept = [row for row in rows if row["step"] < step or row["step"] == step and "loss" in row]
    m.write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
    about = {**vars(args), "processes": m.ranks()[1], "torch": torch.__version__,
             "transformers": transformers.__version__}
    m.write_atomically(Path(args.out, "args.json"), json.dumps(about, indent=1))


def log(args, record, *more):
    """A line of log.jsonl, and one for people."""
    with open(Path(args.out, "log.jsonl"), "a") as file:
        file.write(json.dumps(record) + "\n")
    cells = [f"{key} {value:.4g}" for key, value in record.items() if key != "step"]
    print(f"step {record['step']}", *cells, *more, sep=" | ", flush=True)


# ---- main ----

def teach_only(args, rows, bad, say):
    """--teach-only: the rows that a run with these options asks a teacher about, into its cache."""
    teacher, tokenizer = m.load_llm(args.teacher, getattr(torch, args.dtype))
    item_of = functools.partial(make_item, args=args, student=None, teacher_tokenizer=tokenizer,
                                heard_of=None)
    rows = check_rows([row for row in rows if row["prompt"]], item_of, [teacher], bad)
    say(m.leave_out(bad, args.max_bad_rows, args.out, m.ranks()[0] == 0) or "no row is bad")
    teach_all(args, teacher, item_of, rows, say)


def main(args):
    # ---- rows, before any model loads ----
    out, dtype = Path(args.out), getattr(torch, args.dtype)
    earlier = sorted(out.glob("ckpt-*.pt"), reverse=True)  # the newest first
    if earlier and not args.resume:
        raise ValueError(f"{earlier[0]} exists: add --resume to go on, or choose another --out")
    rank, world = m.start_processes(args.device, "gloo" if args.device == "cpu" else "nccl")
    master = rank == 0  # of `world` processes, one a GPU
    say = functools.partial(print, flush=True) if master else lambda *_: None
    train_rows, eval_rows, counts, bad = read_rows(args)
    say(f"rows: {counts['t2t']} by text, {counts['s2t']} by speech, {counts['sound']} without a "
        f"teacher, {len(eval_rows)} to measure on")
    out.mkdir(parents=True, exist_ok=True)  # fails now, not after the first steps
    if args.teach_only:
        teach_only(args, train_rows + eval_rows, bad, say)
        return 0

    # ---- student, teacher ----
    student = m.load_student(args.student)  # in float32, on the CPU
    teacher, teacher_tokenizer = None, student.tokenizer
    if args.kd_weight and counts["t2t"] + counts["s2t"] or eval_rows:  # CE alone asks none
        teacher, teacher_tokenizer = load_teacher(args, student, dtype)
    choose_what_trains(args, student, dtype)  # before DDP and optimizer, which read the flags
    if args.gradient_checkpointing:
        student.llm.gradient_checkpointing_enable()
    if not args.shard:  # else they move piece by piece; a cached teacher if it has to read
        student.to(args.device)
        if teacher is not None and not args.teacher_cache:
            teacher.to(args.device)

    # ---- what is heard, read and taught ----
    spoken = [row for row in train_rows + eval_rows if channels_of(row, args) != ["t2t"]]
    heard_of = hear_all(args, student, spoken)
    item_of = functools.partial(make_item, args=args, student=student, heard_of=heard_of,
                                teacher_tokenizer=teacher_tokenizer)
    llms, begun_with = (student.llm, teacher), [*map(fingerprint, filter(None, (student, teacher)))]
    train_rows = check_rows(train_rows, item_of, llms, bad)  # now, not at night
    eval_rows = check_rows(eval_rows, item_of, llms, bad)
    left_out = m.leave_out(bad, args.max_bad_rows, out, master) or "no row is bad"
    say(f"{left_out}; {len(train_rows)} train, {len(eval_rows)} are measured")
    if isinstance(student, m.SpeechLLM) and not student.adapter.listens:  # untrained so far
        clips = align_sounds(student, train_rows, heard_of)
        say(f"sound layer: begins with {clips} clips")
    if args.teacher_cache and teacher is not None:
        taught_of = teach_all(args, teacher, item_of, train_rows + eval_rows, say)
        item_of = functools.partial(item_of, taught_of=taught_of)
    plan = plan_steps(train_rows, args)  # all steps, known before the first

    # ---- optimizer, resume, log ----
    if args.shard:
        shard(student, teacher, dtype, args.device)
    optimizer = make_optimizer(args, student)
    content = json.dumps([{**row, "audio": None} for row in train_rows + eval_rows], sort_keys=True)
    identity = {k: v for k, v in vars(args).items() if k not in FREE_OPTIONS}  # to go on with
    identity |= {"processes": world, "weights at the start": begun_with,  # names may change theirs
                 "content of the rows": hashlib.sha256(content.encode()).hexdigest()[:12]}
    step, best, steps = 0, None, len(plan)  # best: the score of OUT/best
    if earlier:
        step, best, damaged = load_checkpoint(earlier, student, optimizer, identity)
        say(f"going on from step {step}; damaged: {', '.join(damaged) or 'none'}")
    if master:
        begin_log(args, step)
    weights = sum(p.numel() for p in student.parameters() if p.requires_grad)
    say(f"{steps} steps; {weights / 1e6:.1f} M weights train")
    stopped = []  # filled by SIGTERM or Ctrl-C; the loop ends before its next step
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.append(True))

    # ---- the loop ----
    autocast = functools.partial(torch.autocast, args.device, dtype, dtype != torch.float32)
    own_rows = [row for row in train_rows if row["own"]]
    if own_rows and not step:
        share = check_own(args, student, teacher, own_rows, item_of, autocast)
        say(f"own answers: of the student's 64 likeliest tokens {share:.2f} are the teacher's")
    model = student
    if world > 1 and not args.shard:
        model = torch.nn.parallel.DistributedDataParallel(student, gradient_as_bucket_view=True)
    channel_weights = {"t2t": args.t2t_weight, "s2t": 1.0, "sound": args.sound_weight}
    # speech first: it keeps most, while no gradients take memory. By text the LLM alone learns
    served = set().union(*[channels_of(row, args) for row in train_rows])
    channels = [c for c in CHANNELS[::-1] if c in served and (c != "t2t" or "llm" in args.train)]

    def items_of(batch):
        return [item_of(train_rows[k]) for k in batch]

    pool = concurrent.futures.ThreadPoolExecutor(1)  # makes the next step's items meanwhile
    plan.append([])  # after the last step there is nothing to make
    ahead = pool.map(items_of, plan[step][rank::world])  # micro-batches go to processes in turn
    begun = time.perf_counter()  # s
    while True:
        micro_batches = list(ahead)  # made, before others use the tokenizers
        if eval_rows and (step == steps or step % (args.eval_every or steps) == 0):
            record = evaluate(args.channels, student, teacher, eval_rows, item_of, autocast)
            score = record.get("eval_kl8_s2t", record.get("eval_kl8_t2t"))
            if best is None or score < best:  # the best early answers by speech
                best = score
                save_folder(student, out / "best", dtype)
            if master:
                log(args, {"step": step, **record})
        if step == steps:
            break
        warm = (step + 1) / max(1, args.lr_warmup_steps)  # linear, times a cosine to zero
        for group in optimizer.param_groups:
            peak = getattr(args, f"lr_{group['part']}")
            group["lr"] = peak * min(1.0, warm) * 0.5 * (1 + math.cos(math.pi * (step / steps)))

        # -------- one optimizer step --------
        student.train()  # evaluation has ended that
        started = time.perf_counter()
        stop = torch.tensor(len(stopped), device=args.device)
        if world > 1:
            dist.all_reduce(stop)
        if stop:  # a signal came to one of the processes: all stop at one step
            break
        ahead = pool.map(items_of, plan[step + 1][rank::world])
        # Mean over ALL supervised tokens of the step (sounds: rows), per channel: a mean of
        # micro-batches' means would weight tokens of short answers more. The plan counts them all
        counted = collections.Counter()
        for row in [train_rows[k] for k in itertools.chain(*plan[step])]:
            for channel in set(channels_of(row, args)) & set(channels):
                size = 1 if channel == "sound" else row["tokens"]
                counted.update({"tokens": row["tokens"], f"kd_{channel}": size,
                                f"ce_{channel}": 0 if row["own"] else size})
        torch.manual_seed(args.seed + 100_003 * step + rank)  # of dropout: also after a restart
        sums = torch.zeros(len(CHANNELS), 3, dtype=torch.float64, device=args.device)
        for micro_step, items in enumerate(micro_batches):
            asked = [item for item in items if item["teacher_ids"]] if args.kd_weight else []
            for item, taught in zip(asked, teacher_rows(teacher, asked)):  # once for both channels
                item["taught"] = taught
            for channel in channels:
                chosen = [item for item in items if channel in item]
                if not chosen:  # all processes make the same passes: one that is read stands in
                    idle = next(item for item in items if "t2t" in item)
                    chosen = [{**idle, channel: idle["t2t"], "answer": []}]
                final = micro_step == len(micro_batches) - 1 and channel == channels[-1]
                # DDP decides in forward whether this backward will sync: no_sync must cover both
                with contextlib.nullcontext() if final or model is student else model.no_sync():
                    prompts = [item[channel] for item in chosen]
                    answers = [item["answer"] for item in chosen]
                    with autocast():
                        hidden = model(prompts, answers)                          # (N, H)
                        loss, ce, kd = channel_loss(args, channel, llms, hidden, chosen)
                    loss = channel_weights[channel] / max(1, counted[f"kd_{channel}"]) * loss
                    (loss * world).backward()  # DDP divides by world; frees what it has read
                sums[CHANNELS.index(channel)] += torch.stack([loss.detach(), ce, kd])
        if world > 1:
            dist.all_reduce(sums)  # logged is what all ranks optimised
        names = [item["id"] for item in itertools.chain(*micro_batches)]
        where = f"step {step + 1}; rows of rank {rank}: {names}; {out} keeps the last good state"
        total = float(sums[:, 0].sum())
        if not sums.isfinite().all():  # on all ranks at once, since they are summed
            raise RuntimeError(f"loss {total} in {where}")
        norms = update(args, optimizer, where)  # {norm_PART}, before clipping
        step += 1

        if master:
            seconds = time.perf_counter() - started
            record = {"step": step, "loss": total}
            for channel, (_, ce, kd) in zip(CHANNELS, sums.tolist()):
                for name, part in ((f"ce_{channel}", ce), (f"kd_{channel}", kd)):
                    if counted[name]:  # tokens, or rows
                        record[name] = part / counted[name]
            memory = (torch.cuda.max_memory_allocated() if args.device == "cuda" else
                      1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes
            record |= {**norms, "lr": max(group["lr"] for group in optimizer.param_groups),
                       "tokens_per_s": counted["tokens"] / seconds, "seconds": seconds,
                       "hours": (time.perf_counter() - begun) / 3600, "memory": memory / 2**30}
            log(args, record, f"{seconds * (steps - step) / 60:.1f} minutes left")
        if step % args.save_every == 0 or step == steps:
            save_checkpoint(args, student, optimizer, step, best, identity)

    # ---- the student ----
    if step == steps:
        save_folder(student, out / "last", dtype)  # complete, or not there at all
        say(f"wrote {out / 'last'}")
        return 0
    if step:  # before the first one torch would save a step that no optimizer has made
        save_checkpoint(args, student, optimizer, step, best, identity)
    say(f"stopped after step {step}; the same command with --resume goes on")
    return 143  # 128 + SIGTERM, as a shell has it


if __name__ == "__main__":
    try:
        code = main(get_args())
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        print("train_kd.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.barrier()  # torchrun kills all when one has ended otherwise
        dist.destroy_process_group()
    sys.exit(code)
