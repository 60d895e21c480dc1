#!/bin/sh
# Start flowspec in a container, with the cluster key that was given to it as a secret.
set -eu
key=/run/secrets/cluster-key
[ ! -s "$key" ] || flowspec key set - <"$key" >/dev/null
exec flowspec "$@"
