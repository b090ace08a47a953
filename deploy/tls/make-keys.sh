#!/usr/bin/env bash
# Keys of a federation: an authority, the coordinator's certificate, and a folder for every participant.
#   make-keys.sh DIR COORDINATOR_HOST NAME...
# Again with more names adds them. Replace one before it expires: seedbed keys rotate DIR NAME; shut one out: seedbed keys revoke DIR NAME.
set -euo pipefail

if [[ $# -lt 3 ]]; then
    sed -n '3,4s/^# \?//p' "$0" >&2
    exit 2
fi
directory=$1 host=$2
shift 2
[[ -f $directory/ca.crt ]] || seedbed keys init "$directory" --host "$host"
for name in "$@"; do
    [[ -d $directory/participants/$name ]] || seedbed keys add "$directory" "$name"
done
seedbed keys list "$directory"
