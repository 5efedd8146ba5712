# nanoRETRO in a container (docs/scaling.md, "In containers"):
#
#     docker build -t nanoretro .                                    # with the CPU build of torch
#     docker build -t nanoretro:cuda --build-arg TORCH=cu130 .       # with the one for CUDA 13.0
#     docker run --rm nanoretro python train.py --help
#
# A command of the project follows the image's name; without one, the image serves.
FROM python:3.11-slim-bookworm

# torch.compile compiles C++ on CPUs, and C on GPUs, and calls openssl. tini is process 1: Python there would ignore
# signals that it has no handler for, and leave dead children.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ openssl tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt requirements-documents.txt requirements-serve.txt ./
# torch alone comes from PyTorch's index, which has other packages, too, and its builds satisfy the pin. The last line
# ends the build if something has replaced it by another one.
ARG TORCH=cpu
RUN pip install --no-cache-dir --no-deps --index-url "https://download.pytorch.org/whl/${TORCH}" \
        "$(grep '^torch==' requirements.txt)" \
    && pip install --no-cache-dir -r requirements-documents.txt -r requirements-serve.txt \
    && python -c "import torch; assert torch.__version__.endswith('+${TORCH}'), torch.__version__"

# Whoever the container runs as (--user) may write to /cache and out, and has a name, which torch asks for. Downloads
# and what numba and torch compile go to /cache: mount a volume there to keep them.
# hadolint ignore=DL3064
ENV HOME=/cache \
    USER=nanoretro \
    NUMBA_CACHE_DIR=/cache/numba \
    TIKTOKEN_CACHE_DIR=/cache/tiktoken \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    WANDB_DIR=/app/out \
    PYTHONUNBUFFERED=1
RUN useradd --uid 1000 --home-dir /cache nanoretro \
    && install --directory --mode=1777 /cache out
COPY . .
USER 1000

EXPOSE 8000
# Not with urllib, which would ask the proxy that Docker puts into the environment. Trainings run with --no-healthcheck.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["python", "-c", "import http.client as h; \
c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "serve.py", "--host=0.0.0.0"]
