# flowspec in a container, for arm64 and amd64; docs/boards.md tells how it is used.
# Every dependency has wheels for both, so that nothing is compiled: docker build --tag flowspec-edge .
ARG BASE=python:3.13-slim-trixie

FROM ${BASE} AS installed
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY flowspec_edge flowspec_edge
COPY exporter exporter
COPY firmware_configs firmware_configs
# EXTRAS=gguf for GGUF files
ARG EXTRAS=""
RUN python3 -m venv /opt/flowspec \
    && /opt/flowspec/bin/pip install --no-cache-dir --only-binary=:all: ".${EXTRAS:+[$EXTRAS]}" \
    && /opt/flowspec/bin/pip uninstall --yes pip

FROM ${BASE}
LABEL org.opencontainers.image.title="flowspec-edge" org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --home-dir /var/lib/flowspec --no-create-home --shell /usr/sbin/nologin flowspec \
    && install -d -o flowspec -g flowspec -m 0700 /var/lib/flowspec
COPY --from=installed /opt/flowspec /opt/flowspec
COPY firmware_configs/container/start.sh /usr/local/bin/flowspec-container
ENV PATH=/opt/flowspec/bin:$PATH FLOWSPEC_HOME=/var/lib/flowspec
# Numeric, so that a runtime can see that it is not root.
USER 10001
VOLUME /var/lib/flowspec
# Links of nodes, and the HTTP API.
EXPOSE 7361 8008
# A node that lives answers a TLS handshake, whoever asks.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python3", "-c", "import ssl; ssl.get_server_certificate(('127.0.0.1', 7361), timeout=3)"]
ENTRYPOINT ["flowspec-container"]
CMD ["node"]
