#!/bin/sh
# Makes the secrets that compose.yaml uses, next to this script: in secrets/ a key for Mem0, the file of API keys that holds its
# hash, Grafana's password, and an empty file for the address that alerts go to; in .env the operator's key. Existing ones are
# kept.
set -eu

cd "$(dirname "$0")"
umask 077
mkdir -p secrets
cd secrets

random_hex() {
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}

if [ ! -e api-keys.yaml ]; then
    key=$(random_hex)
    printf %s "$key" >mem0-key
    digest=$(printf %s "$key" | sha256sum | cut -d' ' -f1)
    printf 'version: 1\nkeys:\n  - name: mem0\n    sha256: %s\n' "$digest" >api-keys.yaml
    echo "made secrets/mem0-key, and secrets/api-keys.yaml with its hash"
fi
if [ ! -e grafana-password ]; then
    random_hex >grafana-password
    echo "made secrets/grafana-password, for the user admin"
fi

if [ ! -e alert-url ]; then
    : >alert-url
    echo "made secrets/alert-url, empty: see ../alertmanager/alertmanager.yml"
fi
if ! grep -q '^GATEWAY_ADMIN_KEY=' ../.env 2>/dev/null; then
    echo "GATEWAY_ADMIN_KEY=$(random_hex)" >>../.env
    echo "made the operator's key, in .env"
fi

# Compose mounts the files as they are, and the containers' users are not this one. The folder keeps others out.
chmod 644 mem0-key api-keys.yaml grafana-password alert-url
