#!/usr/bin/env bash
# From a bare clone to trained and evaluated tiny models on the generated dataset `shapes`, on two CPU cores:
#   bash run_scripts/quickstart.sh                          BLIP
#   bash run_scripts/quickstart.sh --family blip2           BLIP-2, with the image encoder of the former
#   bash run_scripts/quickstart.sh --family instructblip    InstructBLIP, from the latter
#   bash run_scripts/quickstart.sh --family capfilt         CapFilt, from the first one's pretrained model
# The weights that a family starts from are trained first if they are missing, and completed if that was interrupted.
# Writes <output>/{results.json,report.html} and one folder per step with its log, checkpoints and results; CapFilt writes
# <output>/{truth.json,capfilt.json}, and texts/result/train_texts/report.html.
set -euo pipefail
family=blip
while [ $# -gt 0 ]; do
    case "$1" in
        --family) family=${2:-} && shift 2 ;;
        *) echo "usage: $0 [--family blip|blip2|instructblip|capfilt]" >&2 && exit 2 ;;
    esac
done
case "$family" in
    blip) out=output/quickstart ;;
    blip2 | instructblip | capfilt) out=output/quickstart_$family ;;
    *) echo "error: --family must be blip, blip2, instructblip or capfilt, not '$family'" >&2 && exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

recipes=projects/$family/quickstart
encoder=output/quickstart/pretrain/checkpoint_last.pth
blip2=output/quickstart_blip2
started=$SECONDS

# train NAME...: recipes of this family, or of another one as FAMILY/NAME, which resume where they were interrupted; a
# complete one is only tested again
train() {
    for name in "$@"; do
        local recipe=$recipes/$name.yaml
        case "$name" in */*) recipe=projects/${name%/*}/quickstart/${name#*/}.yaml ;; esac
        echo "== ${name#*/} ($recipe)"
        "$python" train.py --cfg-path "$recipe" --resume auto
    done
}
# evaluate RECIPE STEP NAME OPTIONS...: a recipe's test with a step's weights and other settings
evaluate() {
    local recipe=$1 step=$2 name=$3 && shift 3
    echo "== $name"
    "$python" evaluate.py --cfg-path "$recipes/$recipe.yaml" --checkpoint "$step/checkpoint_best.pth" \
        --options "run.job_id=$name" "$@"
}
# begin CHAIN..., finish CHAIN...: functions below that run in the background, two at a time on one core each, each with a
# file for its output. Their process groups end with this script.
end_chains() {
    for group in $(jobs -p); do kill -- "-$group" 2>/dev/null || true; done
}
trap end_chains EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
begin() {
    local chain
    for chain in "$@"; do
        set -m # gives it a process group
        OMP_NUM_THREADS=1 "$chain" >"$out/$chain.txt" 2>&1 </dev/null &
        set +m
        printf -v "pid_$chain" %s $!
        echo "== $chain ... (tail -f $out/$chain.txt)"
    done
}
finish() {
    local chain pid
    for chain in "$@"; do
        pid="pid_$chain"
        if ! wait "${!pid}"; then
            tail -n 20 "$out/$chain.txt" >&2
            echo "error: $chain failed; its output is in $out/$chain.txt" >&2
            exit 1
        fi
        echo "== $chain done, $(((SECONDS - started) / 60)) min so far"
        grep -h " test: .*agg_metrics" "$out/$chain.txt" || true
    done
}
# language_model NAME TEXTS BATCH
language_model() {
    echo "== a tiny language model, $1, learns from texts alone"
    "$python" run_scripts/train_tiny_llm.py "tiny_$1" --texts "projects/blip2/quickstart/$2" --out "$blip2/$1" \
        --batch-size "$3"
}
image_encoder() {
    echo "== the image encoder: a tiny BLIP's"
    train blip/pretrain
}

quickstart_blip() {
    train pretrain caption vqa retrieval
    evaluate vqa "$out/vqa" vqa_blank run.blank_images=True # the accuracy that the questions alone earn
}

texts_opt() { language_model opt _texts_opt.yaml 16; }
texts_t5() { language_model t5 _texts_t5.yaml 24; }
stage1() { train blip2/stage1; }
# with the queries of other images, captions show what the language model knows without the image
stage2_opt() { train blip2/stage2_opt && evaluate stage2_opt "$out/stage2_opt" stage2_opt_shuffled run.shuffle_images=True; }
stage2_t5() { train blip2/stage2_t5 && evaluate stage2_t5 "$out/stage2_t5" stage2_t5_shuffled run.shuffle_images=True; }
# from T5's stage 2; captioning starts from OPT's, retrieval from stage 1
finetune_vqa() { train vqa && evaluate vqa "$out/vqa" vqa_blank run.blank_images=True; }
finetune_others() { train caption retrieval; }
quickstart_blip2() {
    image_encoder
    begin stage1 texts_t5
    finish texts_t5; begin texts_opt
    finish stage1; begin stage2_t5
    finish texts_opt; begin stage2_opt
    finish stage2_t5; begin finetune_vqa
    finish stage2_opt; begin finetune_others
    finish finetune_vqa finetune_others
}

texts_t5_once() { [ -f "$blip2/t5/model.safetensors" ] || texts_t5; }
stage2() { train blip2/stage2_t5; }
instruct() { train instruct; }
instruct_unaware() { train instruct_unaware; }
quickstart_instructblip() {
    image_encoder
    if [ "$encoder" -nt "$blip2/stage1/checkpoint_last.pth" ]; then # there is none, or it is another encoder's
        echo "== a tiny BLIP-2 is trained first: $blip2/stage1, $blip2/stage2_t5"
        rm -rf "$blip2/stage1" "$blip2/stage2_t5"
    fi
    begin stage1 texts_t5_once
    finish stage1 texts_t5_once
    stage2
    begin instruct instruct_unaware
    finish instruct instruct_unaware
    evaluate held_out "$out/instruct" held_out
    evaluate held_out "$out/instruct_unaware" held_out_unaware model.qformer_text_input=False
    evaluate held_out "$blip2/stage2_t5" held_out_blip2 model.arch=blip2_t5
}

# raw web texts against bootstrapped ones, over three seeds; the two rows run side by side
capfilt() { "$python" -m lavis_lite.cli capfilt --cfg-path "$recipes/_chain.yaml" --seeds 1 2 3 "$@"; }
capfilt_none() { capfilt --rows none; }
capfilt_both() { capfilt --rows both; }
captioner() { capfilt --rows both --only captioner; }
filter() { capfilt --rows both --only filter; }
quickstart_capfilt() {
    echo "== the first quickstart's pretrained model"
    train blip/pretrain
    begin captioner filter
    finish captioner filter
    capfilt --rows both --only texts
    "$python" run_scripts/capfilt_truth.py "$out/texts/result/train_texts/manifest.json" --out "$out/truth.json"
    begin capfilt_none capfilt_both
    finish capfilt_none capfilt_both
    capfilt --rows none both
}

if [ -d "$out" ]; then
    echo "== removing the results of an earlier quickstart in $out"
    rm -rf "$out"
fi
mkdir -p "$out"
"quickstart_$family"
[ "$family" = capfilt ] || "$python" run_scripts/quickstart_report.py "$out" --family "$family" --seconds $((SECONDS - started))
echo "== $(((SECONDS - started) / 60)) minutes"
