# lavis_lite with the tested versions. Not built by the project's tests.
#   docker build -t lavis-lite .                          NVIDIA GPUs and CPU (torch's wheels bring CUDA)
#   docker build -t lavis-lite --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .     CPU only, smaller
#   docker run --gpus all --shm-size 8g -v /data:/data -v "$PWD/output:/app/output" lavis-lite train --cfg-path projects/...
FROM python:3.11-slim
# Java for the PTB tokenizer and METEOR of the captioning metrics
RUN apt-get update && apt-get install --yes --no-install-recommends default-jre-headless && rm -rf /var/lib/apt/lists/*
WORKDIR /app
ARG TORCH_INDEX=https://pypi.org/simple
COPY constraints.txt .
RUN pip install --no-cache-dir --constraint constraints.txt --index-url "$TORCH_INDEX" \
    --extra-index-url https://pypi.org/simple torch torchvision
COPY pyproject.toml setup.py README.md LICENSE ./
COPY lavis_lite lavis_lite
RUN pip install --no-cache-dir --constraint constraints.txt ".[lora,quantization]"
COPY projects projects
ENV LAVIS_LITE_DATA=/data HF_HOME=/data/huggingface
ENTRYPOINT ["lavis-lite"]
