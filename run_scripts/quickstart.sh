#!/usr/bin/env bash
# From a bare clone to a trained and evaluated tiny BLIP on the generated dataset `shapes`: about ten minutes on two CPU cores.
# Leaves output/quickstart/{results.json,report.html} and one folder a step with its log, checkpoints and results.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

recipes=projects/blip/quickstart
out=output/quickstart
started=$SECONDS
if [ -d "$out" ]; then
    echo "== removing the results of an earlier quickstart in $out"
    rm -rf "$out"
fi
for step in pretrain caption vqa retrieval; do
    echo "== $step ($recipes/$step.yaml)"
    "$python" train.py --cfg-path "$recipes/$step.yaml"
done
echo "== vqa with blank images: what the questions give away by themselves"
"$python" evaluate.py --cfg-path "$recipes/vqa.yaml" --checkpoint "$out/vqa/checkpoint_best.pth" \
    --options run.blank_images=True run.job_id=vqa_blank
"$python" run_scripts/quickstart_report.py "$out" --seconds $((SECONDS - started))
