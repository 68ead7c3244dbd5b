# Label Studio in the versions of requirements/labelstudio.lock.
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 celloop \
    && mkdir -p /workspace/label-studio /workspace/mlflow /workspace/prefect /workspace/display \
    && chown -R celloop:celloop /workspace
COPY docker/healthy /usr/local/bin/healthy

WORKDIR /app
COPY requirements requirements
RUN --mount=type=cache,target=/root/.cache/pip python requirements/install.py labelstudio

ENV PATH=/app/.venv-labelstudio/bin:$PATH PYTHONUNBUFFERED=1 HOME=/home/celloop
USER celloop
WORKDIR /workspace
