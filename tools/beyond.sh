#!/usr/bin/env bash
# What goes beyond the paper, on top of R6 of tools/run_results.py: each run goes on from it by the same number of steps, and differs in one thing.
#
#   bash tools/beyond.sh                    three hours on two cores with AMX, seven without
#   bash tools/beyond.sh more own           these runs alone, then the table of what is there
#   SEED=1 bash tools/beyond.sh more own    from R6-seed1; DATA: a copy of the data, since R6-seed1 gives other answers
#
# more: the same rows again (what the others are compared with).  kl: their divergence alone.  reverse: the same by the reverse KL.
# own: half of the rows are R6's own answers to what it hears, scored by the teacher.  own-kl: these, and the divergence alone on the others, too.
# own-reverse, own-jsd: as own-kl, by the reverse KL, by the Jensen-Shannon divergence.
# early: the divergence of an answer's first 8 tokens weighs up to twice.
# again: a second round, as many steps from own-reverse, with its own answers.  again-old: the same with R6's answers still.
# Stopped anywhere, the same command goes on; a student that is there is not trained again (delete $STUDENTS/RUN).
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${*:-more kl reverse own-reverse early again again-old}
seed=${SEED:-0} suffix=""
[ "$seed" = 0 ] || suffix=-seed$seed
data=${DATA:-data/result} start=${START:-out/result/R6$suffix/last} out=${STUDENTS:-out/beyond}
results=${RESULTS:-$out/results}
dtype=float32
if grep -q amx_bf16 /proc/cpuinfo 2>/dev/null; then dtype=bfloat16; fi
if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then dtype=bfloat16; fi
say() { printf '\n== %4d s  %s\n' $SECONDS "$*"; }

for engine in piper espeak; do
    [ -f $data/$engine/both-train.jsonl ] || { echo "$data/$engine/both-train.jsonl: no such file; tools/result_data.sh and tools/run_results.py --only base R6 come first" >&2; exit 2; }
done
plain="$data/piper/both-train.jsonl $data/espeak/both-train.jsonl"
measure() { python tools/measure_result.py "$1" --data $data --noise-db 20 10 5 0 --out $results/"$2"; }
for run in $runs; do
    more="" options="" from=$start speaker=$start
    case $run in
    more | own) ;;
    kl | own-kl) options="--ce-weight 0" ;;
    reverse | own-reverse) options="--ce-weight 0 --loss reverse_kl" ;;
    own-jsd) options="--ce-weight 0 --loss jsd" ;;
    early) options="--early-tokens 8" ;;
    again | again-old) options="--ce-weight 0 --loss reverse_kl" from=$out/own-reverse$suffix/last ;;
    *) echo "$run: no such run; expected more, kl, reverse, own, own-kl, own-reverse, own-jsd, early, again or again-old" >&2; exit 2 ;;
    esac
    if [[ $run = own* || $run = again* ]]; then
        [ $run = again ] && speaker=$from
        say "what $speaker answers itself"  # at once, if it was asked before
        python tools/rollouts.py $speaker --data $plain --max-new-tokens 24 --dtype $dtype --seed $seed
        more="$data/piper/both-train-rollouts.jsonl $data/espeak/both-train-rollouts.jsonl"
    fi
    say "$run: ${STEPS:-30} steps"
    [ -f $out/$run$suffix/last/config.json ] || python train_kd.py --student $from --data $plain $more $data/{piper,espeak}/sounds.jsonl $options --max-steps "${STEPS:-30}" --batch-size 16 \
        --sound-batch-size 8 --lr-llm 5e-5 --lr-warmup-steps 4 --seed $seed --cache $data/.cache --dtype $dtype --save-every 20 --resume --out $out/$run$suffix
    mkdir -p $results/$run$suffix && cp $out/$run$suffix/{args.json,log.jsonl} $results/$run$suffix/
    rm -f $out/$run$suffix/ckpt-*.pt
    say "$run: measured"
    measure $out/$run$suffix/last $run$suffix
done
say "teacher and cascade"
measure openai/whisper-base+HuggingFaceTB/SmolLM2-135M-Instruct start
python tools/plot_beyond.py --results $results
