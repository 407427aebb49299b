# The gateway as an image. How it is built and run: deploy/README.md.
#
#   docker build -t embedding-gateway:0.1.0-cuda .
#   docker build -t embedding-gateway:0.1.0-cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#
# Both variants start from the same slim Python. torch from PyPI brings CUDA, cuBLAS and cuDNN as packages, and
# the driver comes from the host at the start (NVIDIA's container toolkit), so an nvidia/cuda base would only hold the
# same libraries a second time, in versions that torch was not built with.

# The tag is for people; the digest (of the index for all architectures) pins the bytes. To find a newer one:
#   docker buildx imagetools inspect python:3.13.X-slim-trixie
ARG PYTHON_IMAGE=python:3.13.16-slim-trixie@sha256:bf44cdfcb76cd3b41e879bc058fc37ec5872002ccfde7fcb765e218cde0cd79c

FROM ${PYTHON_IMAGE} AS build
# Empty: torch from PyPI, with its CUDA libraries.
ARG TORCH_INDEX=
# "cluster" for Ray, "stores" for the clients of vector stores, or both.
ARG EXTRAS=
WORKDIR /app

# The packages, a layer that changes with the locks alone. The gateway itself is installed as a link to /app/gateway, of
# which only the version is needed here. Its metadata require a README.md and a LICENSE, which may be empty.
COPY pyproject.toml ./
COPY requirements/ requirements/
COPY gateway/__init__.py gateway/
RUN --mount=type=cache,target=/root/.cache/pip \
    touch README.md LICENSE \
    && requirements/install.sh run
# Remove a third of the files, which the gateway does not use: tests, headers, symbols, other devices. This happens in a layer of
# this stage, so the image gets only the rest. binutils has strip.
COPY deploy/image/slim.py deploy/image/compile_used.py ./
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends binutils \
    && python slim.py .venv

# The code, a small layer that changes often. Compiled here, because the process may not write to it later; without times, which a copy
# could change. So are the modules of packages that it uses, after it has computed the golden vectors of the bundled model.
COPY gateway/ gateway/
COPY golden/ golden/
COPY models.yaml ./
RUN .venv/bin/python -m compileall -q --invalidation-mode unchecked-hash gateway \
    && HF_HUB_OFFLINE=1 XDG_CACHE_HOME=/tmp/cache PYTHONDONTWRITEBYTECODE=1 .venv/bin/python compile_used.py

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="embedding-gateway" \
      org.opencontainers.image.description="Several embedding models behind one OpenAI-style endpoint" \
      org.opencontainers.image.licenses="MIT"

# A fixed number, so that Kubernetes can see that it is not root, and volumes can be given to it.
RUN groupadd --gid 10001 gateway \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin gateway \
    && install --directory --owner=10001 --group=10001 /cache /state

# The root file system may be read-only. Written are /cache (models from the hub) and /state (experiments), both volumes, and /tmp
# (a tmpfs).
ENV PATH=/app/.venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    GATEWAY_HOST=0.0.0.0 \
    GATEWAY_PORT=8000 \
    GATEWAY_ADMIN_PORT=9000 \
    GATEWAY_MODELS=/app/models.yaml \
    GATEWAY_STATE_DIR=/state \
    GATEWAY_LOG_FORMAT=json

WORKDIR /app
COPY --from=build /app/.venv .venv/
# KubeRay before 1.4, or with ENABLE_LOGIN_SHELL, starts Ray in a login shell, which has Debian's PATH.
RUN for name in gateway ray; do if [ -e /app/.venv/bin/$name ]; then ln -s /app/.venv/bin/$name /usr/local/bin/; fi; done
COPY --from=build /app/gateway gateway/
COPY golden/ golden/
COPY models.yaml deploy/image/healthcheck.py LICENSE ./

USER 10001:10001
VOLUME /cache
VOLUME /state
EXPOSE 8000 9000
STOPSIGNAL SIGTERM
# Ready, not only alive: nothing restarts a container for this, and compose starts what depends on it. Models from the
# hub may take minutes the first time.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 CMD ["python", "-I", "/app/healthcheck.py"]

# gateway serve; other commands in its place: docker run IMAGE check, docker run IMAGE models.
ENTRYPOINT ["gateway"]
CMD ["serve"]
