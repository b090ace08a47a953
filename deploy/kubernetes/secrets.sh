#!/usr/bin/env bash
# Secrets from what `seedbed keys` made; no value ever stands in a file of this folder.
#   secrets.sh coordinator KEYS_DIR      in the coordinator's cluster; again after keys add, rotate or revoke, then
#                                        kubectl -n seedbed rollout restart statefulset/seedbed-coordinator
#   secrets.sh client FOLDER             in the participant's cluster, from the folder that was handed out
set -euo pipefail

usage() {
    sed -n '2,6s/^# \?//p' "$0" >&2
    exit 2
}

apply() { # through a pipe: nothing secret in arguments or in files
    kubectl create secret generic "$2" --namespace "$1" --from-file="$3" --dry-run=client -o yaml | kubectl apply -f -
}

[[ $# -eq 2 && -f "$2/ca.crt" ]] || usage
umask 077
aside=$(mktemp -d)
trap 'rm -rf "$aside"' EXIT
case $1 in
coordinator)
    # The authority's own key and the participants' private keys stay where they are: serving needs neither.
    # Entry by entry, without "./": who unpacks may not change the mode of the volume's own directory.
    find "$2" -mindepth 1 -maxdepth 1 -printf '%P\0' | tar -C "$2" -cf "$aside/keys.tar" --exclude=ca.key \
        --exclude='client.key' --exclude='node.key' --exclude=.lock --null --verbatim-files-from -T -
    apply seedbed seedbed-coordinator-keys "$aside/keys.tar"
    ;;
client)
    for name in ca.crt client.crt client.key node.key; do cp "$2/$name" "$aside/"; done
    apply seedbed-client seedbed-client-keys "$aside"
    ;;
*) usage ;;
esac
