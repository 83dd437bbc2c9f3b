# A researcher who comes from LAVIS: find a recipe, see what it needs, evaluate, compare, use the model in Python.
# docs/recipes.md, docs/reproduce.md, docs/lavis.md
set -euo pipefail
lavis-lite recipes caption coco
lavis-lite recipes blip/quickstart/caption --copy caption.yaml
lavis-lite data status caption.yaml || echo "(the quickstart's weights are not here: random ones will do)"
lavis-lite evaluate --cfg-path caption.yaml --limit 8 --job-id first \
    --options run.output_dir=output "$NO_WEIGHTS" run.num_workers=0 'run.metrics=[bleu,cider]' >metrics.json
lavis-lite table blip >table.txt
lavis-lite convert to-hf blip_caption tiny hf
python - <<'PYTHON'
from lavis_lite.models import load_model_and_preprocess
from PIL import Image

model, vis_processors, _ = load_model_and_preprocess(name="blip_caption", model_type="tiny", is_eval=True, device="cpu")
image = vis_processors["eval"](Image.open("photos/0.png").convert("RGB")).unsqueeze(0)
print(model.generate({"image": image}))
PYTHON
