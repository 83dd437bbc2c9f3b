# An engineer with a folder of images: captions, answers, scores, features, search, maps. docs/commands.md
set -euo pipefail
lavis-lite caption photos/ --out captions.jsonl --model "$CAPTIONER"
lavis-lite ask photos/*.png --question "what is in the picture?" --out answers.csv --model "$ANSWERER"
lavis-lite match photos/ --text "a red wall" --text "a cat" --out scores.jsonl --model "$MATCHER"
lavis-lite embed photos/ --out features.npy --model "$ENCODER"
lavis-lite search photos/ "a red wall" -k 3 --model "$MATCHER" | tee found.txt
lavis-lite explain photos/0.png --text "a red wall" --out explained.png --model "$MATCHER"
