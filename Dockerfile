# syntax=docker/dockerfile:1
#
# An image of `lamina serve`. It listens on port 8000 and wants an API key:
#
#   docker build -t lamina .
#   docker run --init -p 127.0.0.1:8000:8000 -e LAMINA_API_KEY -v lamina-cache:/cache lamina
#
# With traces: --build-arg EXTRAS="cpu tracing" (cpu: FAISS, which policies with an index need). For an NVIDIA GPU, with a C compiler, because Triton compiles a launcher:
#
#   docker build -t lamina:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 \
#     --build-arg PACKAGES="gcc libc6-dev" --build-arg EXTRAS=gpu .
#   docker run --init --gpus all ... lamina:cuda

ARG PYTHON=3.11

# What Lamina needs. This layer, by far the largest, stays as it is until pyproject.toml changes.
FROM python:${PYTHON}-slim AS dependencies
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS="cpu"
RUN python -m venv /opt/lamina
ENV PATH=/opt/lamina/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY pyproject.toml /build/
WORKDIR /build
RUN python -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
      print(*p['dependencies'], *sum((p['optional-dependencies'][e] for e in sys.argv[1:]), []), sep='\n')" \
      $EXTRAS > requirements.txt \
    && grep '^torch' requirements.txt > torch.txt \
    && pip install --index-url "$TORCH_INDEX" -r torch.txt \
    && pip install -r requirements.txt

# Lamina itself, as a wheel.
FROM python:${PYTHON}-slim AS wheel
WORKDIR /build
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:${PYTHON}-slim
ARG PACKAGES=""
RUN if [ -n "$PACKAGES" ]; then \
      apt-get update && apt-get install -y --no-install-recommends $PACKAGES && rm -rf /var/lib/apt/lists/*; \
    fi \
    && useradd --uid 1000 --create-home lamina \
    && install -d -o lamina -g lamina /cache /tls
COPY --from=dependencies /opt/lamina /opt/lamina
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    /opt/lamina/bin/pip install --no-cache-dir --no-deps /dist/*.whl

# Models that were fetched or converted, and compiled kernels, outlive a container in /cache.
ENV PATH=/opt/lamina/bin:$PATH XDG_CACHE_HOME=/cache PYTHONUNBUFFERED=1
VOLUME /cache
USER lamina
WORKDIR /home/lamina
EXPOSE 8000

# 503 while the model is loading, which counts as a failure only after the start period.
HEALTHCHECK --start-period=15m --interval=15s --timeout=5s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# SIGTERM lets requests under way end, for 30 s by default: give a container longer than that before it is killed.
STOPSIGNAL SIGTERM
ENTRYPOINT ["lamina"]
CMD ["serve", "--host", "0.0.0.0"]
