# The application: MLflow, Prefect, workers and backend. TORCH=gpu takes the CUDA build of torch.
FROM python:3.11-slim

ARG TORCH=cpu
RUN useradd --create-home --uid 1000 celloop \
    && mkdir -p /workspace/label-studio /workspace/mlflow /workspace/prefect /workspace/display \
    && chown -R celloop:celloop /workspace
COPY docker/healthy /usr/local/bin/healthy

WORKDIR /app
COPY requirements requirements
COPY pyproject.toml README.md LICENSE ./
COPY loop loop
COPY backend backend
COPY flows flows
COPY configs configs
RUN --mount=type=cache,target=/root/.cache/pip python requirements/install.py app --torch "$TORCH"

ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/home/celloop
USER celloop
WORKDIR /workspace
