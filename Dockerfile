# syntax=docker/dockerfile:1
# The endpoint. `docker build .` makes the image for CPUs; `--target gpu` has PyTorch with CUDA and Triton instead, and is
# several times as large. The last stages hold a virtual environment and nothing that was needed to make it.

FROM python:3.11.14-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CACHE_DIR=/var/cache/pip
RUN python -m venv /opt/stemcache
ENV PATH=/opt/stemcache/bin:$PATH
WORKDIR /src

# torch comes first and alone, so that nothing else chooses its build, and a change of ours does not fetch it again. The
# versions of the rest are bounded in pyproject.toml, which is what hadolint asks for (DL3013); pip's cache is mounted and
# in no image (DL3042, which knows of such a mount in root's home only).
FROM build AS build-cpu
ARG TORCH=torch==2.13.0
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/var/cache/pip \
    pip install --index-url https://download.pytorch.org/whl/cpu "$TORCH"
COPY . .
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/var/cache/pip \
    pip install ".[redis,rag,codecs,otel]"

FROM build AS build-gpu
ARG TORCH=torch==2.13.0
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/var/cache/pip \
    pip install "$TORCH"
COPY . .
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/var/cache/pip \
    pip install ".[gpu,redis,rag,codecs,otel]"

FROM python:3.11.14-slim-bookworm AS runtime
RUN groupadd --gid 10001 stemcache \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin stemcache \
 && install --directory --owner 10001 --group 10001 /var/lib/stemcache
# numba keeps what it compiles for this machine's processor in the volume: else each new container would take ten seconds.
ENV PATH=/opt/stemcache/bin:$PATH \
    HOME=/tmp \
    NUMBA_CACHE_DIR=/var/lib/stemcache/numba \
    PYTHONUNBUFFERED=1
WORKDIR /var/lib/stemcache
USER 10001:10001
EXPOSE 8000
# There is no curl in the image, and none is needed.
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["stemcache"]
CMD ["serve", "--host", "0.0.0.0"]

FROM runtime AS gpu
# Triton compiles a small C library where it runs, and loads it from its cache: so a compiler, and a folder that may hold
# executables, which /tmp may not in the compose file. The versions are the release's (DL3008).
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
ENV TRITON_CACHE_DIR=/var/lib/stemcache/triton
USER 10001:10001
COPY --from=build-gpu /opt/stemcache /opt/stemcache

FROM runtime AS cpu
COPY --from=build-cpu /opt/stemcache /opt/stemcache
