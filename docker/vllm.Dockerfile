# syntax=docker/dockerfile:1
# A GPU node that runs vLLM: vLLM's own image, and Modelfleet with Ray in an environment beside it.
#
#   docker build -f docker/vllm.Dockerfile --build-arg VLLM_VERSION=0.33.0 -t modelfleet-vllm:0.33.0 .
ARG VLLM_VERSION=0.33.0
FROM vllm/vllm-openai:v${VLLM_VERSION}
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv wget tini \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/modelfleet
# Adapters of vision models need it and vLLM does not bring it.
RUN python3 -m pip install --no-deps timm==1.0.31
WORKDIR /src
COPY requirements/serving.txt requirements/serving.txt
RUN /opt/modelfleet/bin/pip install --requirement requirements/serving.txt
COPY pyproject.toml README.md LICENSE ./
COPY operator/ operator/
COPY serving/ serving/
# The base may have a user 1000 of its own; the home must be ours either way.
RUN /opt/modelfleet/bin/pip install --no-deps . \
    && (getent passwd 1000 || useradd --uid 1000 --no-create-home modelfleet) \
    && install --directory --owner=1000 --group=1000 /home/modelfleet
# The engine runs with the image's Python, Ray with ours: they need different versions of the same packages.
ENV MODELFLEET_VLLM_PYTHON=/usr/bin/python3 PATH=/opt/modelfleet/bin:$PATH HOME=/home/modelfleet \
    RAY_USAGE_STATS_ENABLED=0
USER 1000
WORKDIR /home/modelfleet
ENTRYPOINT ["tini", "--"]
CMD ["bash"]
