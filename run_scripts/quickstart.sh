#!/usr/bin/env bash
# From a bare clone to trained and evaluated tiny models on the generated dataset `shapes`, on two CPU cores:
#   bash run_scripts/quickstart.sh                  BLIP, about ten minutes
#   bash run_scripts/quickstart.sh --family blip2   BLIP-2, with the image encoder of the former; its figures are still to be tuned
# Leaves <output>/{results.json,report.html} and one folder a step with its log, checkpoints and results.
set -euo pipefail
family=blip
while [ $# -gt 0 ]; do
    case "$1" in
        --family) family=${2:-} && shift 2 ;;
        *) echo "usage: $0 [--family blip|blip2]" >&2 && exit 2 ;;
    esac
done
case "$family" in
    blip) out=output/quickstart ;;
    blip2) out=output/quickstart_blip2 ;;
    *) echo "error: --family must be blip or blip2, not '$family'" >&2 && exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

recipes=projects/$family/quickstart
encoder=output/quickstart/pretrain/checkpoint_last.pth
started=$SECONDS

train() {
    for step in "$@"; do
        echo "== $step ($recipes/$step.yaml)"
        "$python" train.py --cfg-path "$recipes/$step.yaml"
    done
}
# evaluate STEP NAME OPTIONS...: test a trained step once more under other conditions
evaluate() {
    local step=$1 name=$2 && shift 2
    "$python" evaluate.py --cfg-path "$recipes/$step.yaml" --checkpoint "$out/$step/checkpoint_best.pth" \
        --options "run.job_id=$name" "$@"
}
quickstart_blip() {
    train pretrain caption vqa retrieval
    echo "== vqa with blank images: what the questions give away by themselves"
    evaluate vqa vqa_blank run.blank_images=True
}
quickstart_blip2() {
    if [ ! -f "$encoder" ]; then
        echo "== the image encoder: a tiny BLIP is pretrained (projects/blip/quickstart/pretrain.yaml)"
        "$python" train.py --cfg-path projects/blip/quickstart/pretrain.yaml
    fi
    for llm in opt t5; do
        echo "== a tiny language model, $llm, learns from texts alone"
        "$python" run_scripts/train_tiny_llm.py "tiny_$llm" --texts "$recipes/_llm_texts.yaml" --out "$out/$llm"
    done
    train stage1
    for llm in opt t5; do
        train "stage2_$llm"
        echo "== stage2_$llm with the queries of other images: what the language model knows by itself"
        evaluate "stage2_$llm" "stage2_${llm}_shuffled" run.shuffle_images=True
    done
    train caption vqa retrieval
    echo "== vqa with blank images"
    evaluate vqa vqa_blank run.blank_images=True
}

if [ -d "$out" ]; then
    echo "== removing the results of an earlier quickstart in $out"
    rm -rf "$out"
fi
"quickstart_$family"
"$python" run_scripts/quickstart_report.py "$out" --family "$family" --seconds $((SECONDS - started))
