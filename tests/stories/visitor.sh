# A visitor: what is here, what is missing on this machine, and the demo. README.md, docs/demo.md
set -euo pipefail
lavis-lite --version
lavis-lite doctor
lavis-lite models blip_caption
lavis-lite demo --model "$CAPTIONER" --port "$PORT" >demo.txt 2>&1 &
demo=$!
trap 'kill "$demo" 2>/dev/null || true' EXIT
for _ in $(seq 120); do
    python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$PORT/').read()" 2>/dev/null && break
    kill -0 "$demo" || { cat demo.txt; exit 1; }
    sleep 1
done
python -c "import urllib.request as r; assert b'gradio' in r.urlopen('http://127.0.0.1:$PORT/').read().lower()"
kill -INT "$demo"
