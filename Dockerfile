# The web page and API of `serve` on CPUs, for one model that is mounted read-only:
#
#   docker build -t aptos-fastai .
#   docker run --rm --read-only --tmpfs /tmp --cap-drop ALL -p 127.0.0.1:8000:8000 \
#       -v "$PWD/runs/grades/bundle:/model:ro" aptos-fastai
#
# Building needs the network, running does not. docs/scripts/check_dockerfile.py runs its steps without Docker.

FROM python:3.11-slim AS build
# For PyTorch without CUDA, 0.8 GB instead of 6 GB: --build-arg PIP_EXTRA_INDEX_URL=…, the index of its CPU builds
ARG PIP_EXTRA_INDEX_URL=
RUN python3 -m venv /venv
WORKDIR /src
COPY pyproject.toml README.md LICENSE settings.ini constraints.txt ./
COPY recipes recipes/
COPY aptos_fastai aptos_fastai/
RUN /venv/bin/pip install -q --no-cache-dir -c constraints.txt ".[serve,dicom]"

FROM python:3.11-slim
COPY --from=build /venv /venv
RUN useradd --uid 10001 --no-create-home grader
USER 10001
ENV PATH=/venv/bin:$PATH HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["aptos-fastai", "serve", "/model", "--host", "0.0.0.0"]
