"""
How far the student is from its teacher on VoiceBench's questions, token by token: no judge needed.

  python tools/divergence.py --student out/quick/best --data data/voicebench --out out/voicebench

F = KL(teacher by text || student by text): what was forgotten; M = KL(student by text || student by
speech): what is lost by hearing. Both in nats a token, on the teacher's own answers.
Reads   what eval_voicebench.py reads, with its options; the same --out has the teacher's answers
Writes  OUT/divergence.json; prints a table with 95% intervals
"""
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_voicebench as vb
import losses
import model as m
import train_kd

ANSWER_TOKENS = 64  # of a teacher's answer


@torch.inference_mode()
def divergences(teacher, tokenizer, student, rows):
    """F = KL(teacher by text || student by text), M = KL(student by text || student by speech).

    Returns: a record each, its "sums" [tokens, F, M] over its response, which is cut at
    ANSWER_TOKENS; in nats at tau 1, no M without "audio".
    """
    answers, asked, by_text, by_speech, kls = [], [], [], [], []
    for row in rows:
        answers.append(train_kd.answer_ids(tokenizer, row, "response", ANSWER_TOKENS))
        before, after = m.chat_parts(tokenizer, row["system"])
        ids = before + m.text_ids(tokenizer, row["prompt"]) + after + answers[-1]
        asked.append(torch.tensor(ids, device=teacher.device))
        by_text.append(student.prompt({**row, "audio": None}))
    if rows[0]["audio"] is not None:  # then all have it, and are heard together
        waveforms = [m.load_audio(row["audio"]) for row in rows]
        heard = student.hear(waveforms, [row.get("language") for row in rows])
        by_speech = [student.prompt(row, clip) for row, clip in zip(rows, heard)]
    lengths = [len(ids) for ids in answers]
    hidden, llm = m.answer_states(teacher, asked, lengths), teacher                # (N, H)
    for prompts in filter(None, (by_text, by_speech)):
        with torch.autocast(teacher.device.type, teacher.dtype, teacher.dtype != torch.float32):
            following = student(prompts, answers)
        kl, *_ = losses.token_kl(
            student_hidden=following, student_weight=student.llm.get_output_embeddings().weight,
            teacher_hidden=hidden, teacher_weight=llm.get_output_embeddings().weight,
            student_logit_scale=m.logit_scale(student.llm), teacher_logit_scale=m.logit_scale(llm))
        kls.append(kl.double().split(lengths))                                    # (n_i,) each
        hidden, llm = following, student.llm  # what M is measured from
    records = []
    for row, *row_kls in zip(rows, *kls):
        sums = [len(row_kls[0]), *(float(kl.sum()) for kl in row_kls)]
        records.append({"id": row["id"], "sums": sums})
    return records


def main(args):
    if args.score_only or args.teacher == "none":
        raise ValueError("--score-only or --teacher none: expected a student and a teacher to ask")
    rank, out = m.start_processes(args.device)[0], Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    data, _ = vb.read_data(args)
    teacher = functools.cache(functools.partial(vb.load_model, args, "teacher"))
    student = functools.cache(functools.partial(vb.load_model, args, "student"))
    weights = {role: vb.weights_of(getattr(args, role)) for role in ("teacher", "student")}

    def measure(rows):
        train_kd.check_pair(*teacher(), student())
        return divergences(*teacher(), student(), rows)

    subsets = {}
    for subset, rows in data.items():
        answers = vb.answer_all(args, f"teacher-{subset}-text", rows["text"],
                                functools.partial(vb.ask, args, "teacher", teacher),
                                weights["teacher"])
        asked = []
        for row, answer in zip(rows["speech"] or rows["text"], answers):
            asked.append({**row, "response": answer["response"], "finish": answer["finish"]})
        records = vb.answer_all(args, f"divergence-{subset}", asked, measure, weights)
        subsets[subset] = {"rows": len(records)}
        for k, name in enumerate("FM"[:len(records[0]["sums"]) - 1], 1):
            parts = [[[record["sums"][k], record["sums"][0]]] for record in records]
            subsets[subset][name] = vb.spread(vb.bootstrap(parts))
    if rank:
        return
    vb.write_json(out / "divergence.json", {"subsets": subsets, "weights": weights,
                                            "answer_tokens": ANSWER_TOKENS, **vb.provenance(args)})
    for subset, entry in subsets.items():
        for name in ("F", "M"):
            if name in entry:
                print("{:16} {} {:.3f} [{:.3f}, {:.3f}]".format(subset, name, *entry[name]))


if __name__ == "__main__":
    try:
        main(vb.get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print("divergence.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
