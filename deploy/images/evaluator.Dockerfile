# An evaluator: docker build -f deploy/images/evaluator.Dockerfile -t tutelage-evaluator:0.1.0 .
FROM python:3.11.13-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/tutelage
ENV PATH=/opt/tutelage/bin:$PATH
WORKDIR /source
COPY . .
RUN pip install --constraint requirements/cpu.lock '.[evaluator]'

FROM python:3.11.13-slim-bookworm
RUN useradd --uid 10001 --create-home tutelage
COPY --from=build /opt/tutelage /opt/tutelage
ENV PATH=/opt/tutelage/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/tutelage
ENTRYPOINT ["tutelage", "evaluate", "serve"]
CMD ["--help"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m \
    CMD ["python", "-m", "tutelage.rpc.health", "127.0.0.1:50062"]
