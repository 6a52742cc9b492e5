# atp-tune in a container. The base image has Python >= 3.11, and for a GPU torch with CUDA:
#   docker build -t atp-tune .
#   docker build -t atp-tune --build-arg TORCH_INDEX=URL .      # torch from this index, without CUDA: 5 GB less
#   docker build -t atp-tune --build-arg EXTRAS=speed,eval .    # with packages of some commands; all: of all
#   docker build -t atp-tune --build-arg BASE=IMAGE .           # an image of PyTorch with CUDA: its torch is kept
#   docker run --rm -v "$PWD:/data" -v atp-tune-cache:/cache atp-tune --study smol           # on a GPU: --gpus all
# /data has the studies (files in /data/studies, and what runs write), /cache the models.
ARG BASE=python:3.12-slim-trixie

FROM python:3.12-slim-trixie AS build
WORKDIR /source
RUN pip install --no-cache-dir build==1.3.0
COPY . .
RUN python -m build --outdir /dist

# hadolint ignore=DL3006
FROM ${BASE}
ARG TORCH_INDEX=
ARG EXTRAS=
COPY --from=build /dist/*.whl /tmp/
# hadolint ignore=DL3013
RUN set -e; \
    wheel="$(echo /tmp/atp_tune-*.whl)"; \
    pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "${wheel}${EXTRAS:+[$EXTRAS]}"; \
    rm /tmp/*.whl; \
    useradd --create-home --uid 1000 tune; \
    mkdir -p /cache /data; \
    chown tune:tune /cache /data
ENV ATP_TUNE_CACHE=/cache/atp_tune HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
USER 1000
WORKDIR /data
VOLUME ["/cache", "/data"]
EXPOSE 8080 13000
ENTRYPOINT ["atp-tune"]
CMD ["--help"]
