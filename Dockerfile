# One image for every process of a cluster. PyTorch comes from pip's own index unless another one is named:
#   --build-arg TORCH_INDEX=URL    the index of PyTorch's CPU builds (much smaller) or of one CUDA version
FROM python:3.11-slim

ARG TORCH_INDEX=

# The torch engine compiles its CPU kernels with g++ on first use; without it torch's own operators do the work.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 autan \
 && install -d -o autan -g autan /app /var/lib/autan
WORKDIR /app
ENV AUTAN_HOME=/var/lib/autan \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0

# The packages first: they change less often than the code.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install -c constraints.txt setuptools \
 && pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch \
 && python -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]))' \
      > /tmp/requirements.txt \
 && pip install -c constraints.txt -r /tmp/requirements.txt

COPY configs configs
COPY protos protos
COPY orchestrator orchestrator
COPY workers workers
RUN pip install --no-build-isolation --no-deps .

USER autan
WORKDIR /home/autan
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["autan", "status", "--json"]
ENTRYPOINT ["autan"]
CMD ["up", "oracle"]
