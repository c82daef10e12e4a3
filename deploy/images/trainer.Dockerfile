# Students, and Ray's nodes: docker build -f deploy/images/trainer.Dockerfile -t tutelage-trainer:0.1.0 .
FROM python:3.11.13-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/tutelage
ENV PATH=/opt/tutelage/bin:$PATH
WORKDIR /source
COPY . .
# The lock has the version of Ray that `ray.version` of the chart says.
RUN pip install --constraint requirements/cpu.lock '.[trainer]'

FROM python:3.11.13-slim-bookworm
RUN useradd --uid 10001 --create-home tutelage
COPY --from=build /opt/tutelage /opt/tutelage
ENV PATH=/opt/tutelage/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/tutelage
# No entry point: KubeRay gives each node its own command.
CMD ["tutelage", "train", "--help"]
