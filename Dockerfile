# The server in a container, with the protocol at /. Without a GPU as it stands; for Nvidia's:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --tag remote-vae .
# See docs/server.md, "Docker".
FROM python:3.12-slim

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# First and by itself: the other packages must take the one that is there, and an update of ours does not fetch it anew.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$TORCH"

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY settings settings
COPY remote_vae remote_vae
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[server,video]" "accelerate>=1.0" \
    && useradd --create-home --uid 1000 vae \
    && install --directory --owner=vae --group=vae /home/vae/.cache

# Hosted endpoints mount the model at /repository and call port 80. VAE may be a Hugging Face id; OPTIONS are those of
# "remote-vae serve"; REMOTE_VAE_TOKEN, where it is given, is the token that clients must have.
ENV VAE=/repository \
    PORT=80 \
    OPTIONS="" \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The user vae by number, so that a cluster can see that it is not root.
USER 1000
WORKDIR /home/vae
EXPOSE 80

# A first start may download the VAE. Straight to this container, whatever proxy its environment names.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]

# exec: a stop of the container reaches the server, which ends what it has begun.
CMD ["sh", "-c", "exec remote-vae serve --vae \"$VAE\" --host 0.0.0.0 --port \"$PORT\" $OPTIONS"]
