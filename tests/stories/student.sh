# A student with photos and a text file beside each: train, look, use. docs/own_photos.md, docs/report.md
# In the stories a variable such as CAPTIONER stands for a type of the zoo.
set -euo pipefail
lavis-lite train --data photos/ --model "$CAPTIONER" --out output/photos --dry-run | grep "^memory"
lavis-lite train --data photos/ --model "$CAPTIONER" --out output/photos --epochs 2 --job-id mine
lavis-lite report output/photos/mine
lavis-lite caption more_photos/ --model output/photos/mine/checkpoint_best.pth --out captions.csv
