# A teacher. From the repository's root: docker build -f deploy/images/teacher.Dockerfile --target gpu -t tutelage-teacher:0.1.0 .
# `--target cpu` makes one for machines without a GPU.
FROM python:3.11.13-slim-bookworm AS environment
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/tutelage
ENV PATH=/opt/tutelage/bin:$PATH
WORKDIR /source

FROM environment AS build-cpu
COPY requirements/ requirements/
RUN pip install --no-deps -r requirements/cpu.lock && pip install --no-deps -r requirements/no-deps.lock
COPY . .
RUN pip install --no-deps --no-build-isolation .

FROM environment AS build-gpu
COPY . .
# vLLM says which torch and transformers; the lock is of its CPU build.
# hadolint ignore=DL3013
RUN pip install '.[teacher]' vllm==0.32.0

FROM python:3.11.13-slim-bookworm AS base
RUN useradd --uid 10001 --create-home tutelage
ENV PATH=/opt/tutelage/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/tutelage
ENTRYPOINT ["tutelage", "teacher", "serve"]
CMD ["--help"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
    CMD ["python", "-m", "tutelage.rpc.health", "127.0.0.1:50061"]

FROM base AS cpu
COPY --from=build-cpu /opt/tutelage /opt/tutelage

FROM base AS gpu
COPY --from=build-gpu /opt/tutelage /opt/tutelage
